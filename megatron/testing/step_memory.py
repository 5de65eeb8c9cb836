"""Peak resident memory of training steps in a fresh process: `python -m megatron.testing.step_memory '<json>'`.

The JSON holds the exit layers and sizes; the answer is one JSON line on standard output.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.training import OptimizerConfig
from megatron.data.loader import Microbatch
from megatron.exits.loss import Objective
from megatron.exits.spec import FINAL
from megatron.model.gpt import GPT
from megatron.model.stage import Stage
from megatron.optim.optimizer import TrainingOptimizer
from megatron.parallel.backend import peak_resident_bytes
from megatron.testing.tiny import accumulate, build_gpt, random_batch


def training_step(
    config: ModelConfig, exits: ExitConfig, vocab: int, batch: Microbatch
) -> tuple[GPT, Callable[[], None]]:
    """A model, and its training step on one microbatch: forward, all heads, backward, clipping and AdamW."""
    model = build_gpt(config, exits, vocab, vocab)
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad = None
    optimizer, stage = TrainingOptimizer(model.named_parameters(), OptimizerConfig()), Stage(model)
    weights = {**dict.fromkeys(map(str, exits.exit_layer_nums), 0.5), FINAL: 1.0}
    goal = Objective(weights, {}, frozenset())

    def step() -> None:
        optimizer.zero_grad()
        accumulate(stage, [batch], goal)
        optimizer.step(1e-3, 0.0, 1.0, True)

    return model, step


def measure(exits: list[int], sizes: dict[str, int], steps: int = 2) -> dict[str, int]:
    """Train a few steps; returns peak memory above that of the empty process, and the state's own bytes."""
    torch.set_num_threads(1)
    empty = peak_resident_bytes()
    vocab, batch, length = sizes.pop("vocab"), sizes.pop("batch"), sizes["seq_length"]
    config = ModelConfig(attention_dropout=0.0, hidden_dropout=0.0, **sizes)
    exit_config = ExitConfig(exit_layer_nums=tuple(exits), exit_norm="own" if exits else "none")
    model, step = training_step(config, exit_config, vocab, random_batch(batch, length, vocab))
    for _ in range(steps):
        step()
    parameters = sum(p.numel() for p in model.parameters())
    return {"peak": peak_resident_bytes() - empty, "state": parameters * 4 * 4, "threads": threading.active_count()}


def measure_in_fresh_process(exits: list[int], sizes: dict[str, int]) -> dict[str, int]:
    """`measure` where nothing else has raised the peak."""
    command = [sys.executable, "-m", "megatron.testing.step_memory", json.dumps({"exits": exits, "sizes": sizes})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(measure(question["exits"], question["sizes"])) + "\n")
