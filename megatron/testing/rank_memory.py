"""Peak memory and executed actions of each rank of a training step, in fresh processes of any layout.

`python -m megatron.testing.rank_memory '<json>'`, under torchrun or alone. The JSON holds the words of a training
command line; the first rank answers with one JSON line on standard output: a list by rank, see `RankMemory`. Freed
memory is given back to the system at once, so that peaks are of what is alive together (`MALLOC_MMAP_THRESHOLD_`, of
glibc; elsewhere figures are larger).
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
from megatron.config.model import ExitConfig
from megatron.parallel.backend import Backend, peak_resident_bytes
from megatron.parallel.mesh import Mesh, launched_rank
from megatron.schedule.actions import COMPUTES
from megatron.schedule.trace import Recorder
from megatron.testing.step_memory import training_step
from megatron.testing.tiny import model_config, random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.step import train_step

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, and what it computed in a step.

    peak: most that was resident, above that of a process that trained a toy; parameters; gradients; state: what the
    optimizer keeps beside them. pp: which pipeline rank it is. actions: computes of a step, in order.
    """

    peak: int
    parameters: int
    gradients: int
    state: int
    pp: int
    actions: tuple[str, ...]

    @property
    def kept(self) -> int:
        """What is alive between steps."""
        return self.parameters + self.gradients + self.state


def measure(words: Sequence[str], steps: int = 2) -> list[RankMemory]:
    """Train a few steps on random tokens; returns every rank's figures on every rank.

    The first step makes what is kept between steps; the actions are the last one's.
    """
    torch.set_num_threads(1)
    config, backend = load(words).config, Backend.choose("gloo")
    mesh = Mesh.build(config.parallel, backend)
    _warm_up(mesh)
    empty = peak_resident_bytes()
    trainer = build_trainer(config, mesh=mesh)
    checkpoints.start(trainer)
    training, length = config.training, config.model.seq_length
    count = training.global_batch_size // (training.micro_batch_size * mesh.size("dp"))
    batches = [random_batch(training.micro_batch_size, length, trainer.vocab_size - 1, seed=m) for m in range(count)]
    for _ in range(steps):
        recorder = Recorder(backend.stamp, backend.seconds)
        report = train_step(trainer, batches, recorder)
        assert report.applied, report.problem
    parameters = list(trainer.model.parameters())
    mine = RankMemory(
        peak=peak_resident_bytes() - empty,
        parameters=sum(p.nbytes for p in parameters),
        gradients=sum(p.main_grad.nbytes for p in parameters),
        state=sum(tensor.nbytes for _, _, tensor in trainer.optimizer.state_tensors()),
        pp=mesh.rank("pp"),
        actions=tuple(str(one.action) for one in recorder.happened() if one.action.op in COMPUTES),
    )
    found = trainer.peers.gather(mine)
    mesh.close()
    return found


def _warm_up(mesh: Mesh) -> None:
    """Train a model of next to nothing: code is loaded, and libraries make their own buffers."""
    _, step = training_step(model_config("llama"), ExitConfig(exit_layer_nums=(1,)), 64, random_batch())
    step()
    mesh.sum(torch.ones(4))


def measure_in_fresh_processes(words: Sequence[str], ranks: int) -> list[RankMemory]:
    """`measure` in so many processes, where nothing else has raised the peak."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "megatron.testing.rank_memory", json.dumps(list(words))]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    answers = json.loads(done.stdout.splitlines()[-1])
    return [RankMemory(**one | {"actions": tuple(one["actions"])}) for one in answers]


if __name__ == "__main__":
    answer = measure(json.loads(sys.argv[1]))
    if launched_rank() == 0:
        sys.stdout.write(json.dumps([asdict(one) for one in answer]) + "\n")
