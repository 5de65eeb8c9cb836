"""Toy runs under torchrun, as a user starts them, and the processes they are made of."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.testing.corpus import training_flags, write_corpus

SCRIPT = Path(__file__).parents[2] / "pretrain_early_exit_gpt.py"
PARALLEL: dict[str, tuple[int, dict[str, object]]] = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2": (2, {"use_distributed_optimizer": True}),
    "pp2dp2": (4, {"pipeline_model_parallel_size": 2}),
}
_RANK = re.compile(rb"(?:^|\0)RANK=(\d+)\0")


class Launcher:
    """Starts runs on one toy corpus."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = write_corpus(root / "corpus")

    def start(self, ranks: int, metrics: str, *torchrun: str, env: dict[str, str] | None = None, **flags: object):
        """A run under torchrun (without words for it, all of them here), or alone."""
        flags = {"train_iters": 8, "lr_decay_iters": 8, "distributed_timeout_minutes": 1} | flags
        words = training_flags(self.corpus, self.root / "cache", metrics_file=self.root / metrics, **flags)
        nodes = () if any(word.startswith("--nnodes") for word in torchrun) else ("--standalone",)
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *nodes, *torchrun]
        alone = ranks == 1 and not torchrun
        return subprocess.Popen(
            [sys.executable, *([] if alone else launcher), str(SCRIPT), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), start_new_session=True,
        )  # fmt: skip

    def start_nodes(self, metrics: str, words: list[list[str]], **flags: object) -> list[subprocess.Popen]:
        """One process each on as many nodes as there are lists of words for their torchruns."""
        return [self.start(1, metrics, f"--nnodes={len(words)}", *own, **flags) for own in words]

    def run(self, *args, **kwargs) -> list[dict]:
        """To a good end; the lines of its metrics file, without times."""
        finished(self.start(*args, **kwargs))
        return self.steps(args[1])

    def steps(self, metrics: str) -> list[dict]:
        """What the steps so far were, without times; of a step that was made twice both lines."""
        path = self.root / metrics
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        keep = ("iteration", "loss/final", "loss/exit_1", "loss/exit_3", "grad_norm", "lr", "consumed_samples")
        return [{name: line[name] for name in keep} for line in lines if "loss/final" in line]

    def wait_for_steps(self, process: subprocess.Popen, metrics: str, count: int) -> None:
        """Wait until a run has made so many steps."""
        wait_for(lambda: process.poll() is not None or len(self.steps(metrics)) >= count, "the run did not begin")
        assert process.poll() is None, process.communicate()[0][-3000:]


def finished(process: subprocess.Popen, code: int = 0) -> str:
    """What a run said until its end, which is to be good."""
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said[-5000:]
    return said


def wait_for(condition, otherwise: str, seconds: float = 90.0) -> float:
    """Wait until a condition holds; the seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, otherwise
        time.sleep(0.02)
    return time.monotonic() - start


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def workers(metrics: Path) -> dict[int, int]:
    """Rank -> process id of the run that writes `metrics`, those that still run."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            if str(metrics).encode() in words and b"torch.distributed.run" not in words:
                rank = _RANK.search((process / "environ").read_bytes())
                if rank and alive(int(process.name)):
                    found[int(rank[1])] = int(process.name)
        except OSError:  # it has just ended
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped; one that has ended and not been waited for does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def state(save: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights and optimizer."""
    return native.read(recognise(save).directory).tensors


def assert_same_state(ours: Path, theirs: Path) -> None:
    """The newest checkpoints of two runs hold the same bits."""
    mine, other = state(ours), state(theirs)
    assert mine.keys() == other.keys()
    assert not [name for name, tensor in mine.items() if not torch.equal(tensor, other[name])]
