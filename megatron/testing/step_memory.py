"""Peak resident memory of training steps in a fresh process: `python -m megatron.testing.step_memory '<json>'`.

The JSON holds the exit layers and sizes; the answer is one JSON line on standard output.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.training import OptimizerConfig
from megatron.exits.loss import Objective
from megatron.exits.spec import FINAL
from megatron.model.stage import Stage
from megatron.optim.optimizer import TrainingOptimizer
from megatron.parallel.backend import peak_resident_bytes
from megatron.schedule.execute import run
from megatron.schedule.generate import one_f_one_b
from megatron.testing.tiny import build_gpt, random_batch


def measure(exits: list[int], sizes: dict[str, int], steps: int = 2) -> dict[str, int]:
    """Train a few steps; returns peak memory above that of the empty process, and the state's own bytes."""
    torch.set_num_threads(1)
    empty = peak_resident_bytes()
    vocab, batch, length = sizes.pop("vocab"), sizes.pop("batch"), sizes["seq_length"]
    config = ModelConfig(attention_dropout=0.0, hidden_dropout=0.0, **sizes)
    exit_config = ExitConfig(exit_layer_nums=tuple(exits), exit_norm="own" if exits else "none")
    model = build_gpt(config, exit_config, vocab, vocab)
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad = None
    optimizer = TrainingOptimizer(model.named_parameters(), OptimizerConfig())
    stage, data = Stage(model), random_batch(batch, length, vocab)
    goal = Objective({**dict.fromkeys(map(str, exits), 0.5), FINAL: 1.0}, {}, frozenset(), 1)
    for _ in range(steps):
        optimizer.zero_grad()
        run(one_f_one_b(1, 1)[0], stage, [data], [None], goal)
        optimizer.step(1e-3, 0.0, 1.0, True)
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
