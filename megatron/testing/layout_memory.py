"""Peak memory and executed actions of training steps in fresh processes of any layout.

`python -m megatron.testing.layout_memory FLAGS...` is one rank: it prints one JSON line. `measure_layout` starts them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.config.load import load
from megatron.config.model import ExitConfig
from megatron.parallel.backend import Backend, peak_resident_bytes
from megatron.parallel.mesh import Mesh, launched_rank
from megatron.schedule import execute
from megatron.schedule.actions import COMPUTES, Action
from megatron.testing.step_memory import training_step
from megatron.testing.tiny import model_config, random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.step import train_step

STEPS = 2  # the first one makes what is kept between steps
# Freed tensors go back to the system at once, so that the peak is of what is alive.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@contextmanager
def recorded() -> Iterator[list[Action]]:
    """The computes that are executed within the block."""
    done: list[Action] = []
    inner = execute._Worker.do

    def do(worker: execute._Worker, action: Action) -> None:
        inner(worker, action)
        if action.op in COMPUTES:
            done.append(action)

    execute._Worker.do = do
    try:
        yield done
    finally:
        execute._Worker.do = inner


def measure(words: Sequence[str]) -> dict[str, Any]:
    """This rank's peak resident bytes above those of a process that trained a toy, and its actions of a step."""
    config = load(words).config
    backend = Backend.choose("gloo")
    torch.set_num_threads(1)
    mesh = Mesh.build(config.parallel, backend)
    _warm_up(mesh)
    empty = peak_resident_bytes()
    trainer = build_trainer(config, backend)
    checkpoints.start(trainer)
    training, model = config.training, config.model
    count = training.global_batch_size // (training.micro_batch_size * mesh.size("dp"))
    batches = [
        random_batch(training.micro_batch_size, model.seq_length, trainer.vocab_size - 1, seed=m) for m in range(count)
    ]
    for _ in range(STEPS):
        with recorded() as done:
            report = train_step(trainer, batches)
        assert report.applied, report.problem
    answer = {"peak": peak_resident_bytes() - empty, "pp": mesh.rank("pp"), "actions": [str(action) for action in done]}
    trainer.mesh.close()
    return answer


def _warm_up(mesh: Mesh) -> None:
    """Train a model of next to nothing: code is loaded, and libraries make their own buffers."""
    shape = model_config("llama")
    _, step = training_step(shape, ExitConfig(exit_layer_nums=(1,)), 64, random_batch())
    step()
    mesh.sum(torch.ones(4))


def measure_layout(words: Sequence[str], ranks: int) -> list[dict[str, Any]]:
    """`measure` on so many fresh processes; their answers by rank."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | ENVIRONMENT | {
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "LAYOUT_ANSWERS": directory,
        }  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, "-m", "megatron.testing.layout_memory", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    (Path(os.environ["LAYOUT_ANSWERS"]) / str(launched_rank())).write_text(json.dumps(measure(sys.argv[1:])))
