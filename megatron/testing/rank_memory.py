"""Peak memory of each rank of a training step, in fresh processes: `python -m megatron.testing.rank_memory '<json>'`.

Under torchrun, or alone. The JSON holds the words of a training command line; the first rank answers with one JSON line
on standard output: a list by rank, see `RankMemory`. Freed memory is given back to the system at once, so that peaks
are of what is alive together (`MALLOC_MMAP_THRESHOLD_`, of glibc; elsewhere figures are larger).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron.config.load import load
from megatron.parallel.backend import Backend, peak_resident_bytes
from megatron.parallel.mesh import Mesh, launched_rank
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.step import train_step


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. peak: most that was resident, above that of a process without a model; parameters; gradients;
    state: what the optimizer keeps beside parameters and gradients."""

    peak: int
    parameters: int
    gradients: int
    state: int

    @property
    def kept(self) -> int:
        """What is alive between steps."""
        return self.parameters + self.gradients + self.state


def measure(words: Sequence[str], steps: int = 2) -> list[RankMemory]:
    """Train a few steps on random tokens; returns every rank's figures on every rank."""
    torch.set_num_threads(1)
    config = load(words).config
    mesh = Mesh.build(config.parallel, Backend.choose("gloo"))
    empty = peak_resident_bytes()
    trainer = build_trainer(config, mesh=mesh)
    checkpoints.start(trainer)
    training, length = config.training, config.model.seq_length
    count = training.global_batch_size // (training.micro_batch_size * mesh.size("dp"))
    batches = [random_batch(training.micro_batch_size, length, trainer.vocab_size, seed=m) for m in range(count)]
    for _ in range(steps):
        assert train_step(trainer, batches).applied
    parameters = list(trainer.model.parameters())
    mine = RankMemory(
        peak=peak_resident_bytes() - empty,
        parameters=sum(p.nbytes for p in parameters),
        gradients=sum(p.main_grad.nbytes for p in parameters),
        state=sum(tensor.nbytes for _, _, tensor in trainer.optimizer.state_tensors()),
    )
    found = trainer.peers.gather(mine)
    mesh.close()
    return found


def measure_in_fresh_processes(words: Sequence[str], ranks: int) -> list[RankMemory]:
    """`measure` in so many processes, where nothing else has raised the peak."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "megatron.testing.rank_memory", json.dumps(list(words))]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return [RankMemory(**one) for one in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    answer = measure(json.loads(sys.argv[1]))
    if launched_rank() == 0:
        sys.stdout.write(json.dumps([asdict(one) for one in answer]) + "\n")
