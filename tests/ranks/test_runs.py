"""Whole runs of several ranks by torchrun: resumed, stopped, and with a rank that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.checkpoint.find import recognise
from megatron.testing.corpus import training_flags, write_corpus

SCRIPT = Path(__file__).parents[2] / "pretrain_early_exit_gpt.py"
PARALLEL = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2": (2, {"use_distributed_optimizer": True}),
}


class Launcher:
    """Starts runs on one toy corpus."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = write_corpus(root / "corpus")

    def start(self, ranks: int, metrics: str, *torchrun: str, env: dict[str, str] | None = None, **flags: object):
        """A run under torchrun, or alone."""
        flags = {"train_iters": 8, "lr_decay_iters": 8, "distributed_timeout_minutes": 1} | flags
        words = training_flags(self.corpus, self.root / "cache", metrics_file=self.root / metrics, **flags)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *torchrun]
        return subprocess.Popen(
            [sys.executable, *(launcher if ranks > 1 else []), str(SCRIPT), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), start_new_session=True,
        )  # fmt: skip

    def run(self, *args, **kwargs) -> list[dict]:
        """To a good end; the lines of its metrics file, without times."""
        process = self.start(*args, **kwargs)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said[-3000:]
        return self.steps(args[1])

    def steps(self, metrics: str) -> list[dict]:
        lines = [json.loads(line) for line in (self.root / metrics).read_text().splitlines()]
        keep = ("iteration", "loss/final", "loss/exit_1", "loss/exit_3", "grad_norm", "lr", "consumed_samples")
        return [{name: line[name] for name in keep} for line in lines if "loss/final" in line]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "layout", ["pp2", pytest.param("tp2", marks=pytest.mark.slow), pytest.param("dp2", marks=pytest.mark.slow)]
)
def test_resumed_in_the_same_layout_bit_for_bit(launcher: Launcher, layout: str) -> None:
    ranks, flags = PARALLEL[layout]
    whole = launcher.run(ranks, f"{layout}-whole.jsonl", **flags)
    save = {"save": launcher.root / layout, "load": launcher.root / layout}
    first = launcher.run(ranks, f"{layout}-parts.jsonl", exit_interval=3, **flags, **save)
    assert [line["iteration"] for line in first] == [1, 2, 3]
    assert launcher.run(ranks, f"{layout}-parts.jsonl", **flags, **save) == whole


def test_resumed_in_another_layout(launcher: Launcher) -> None:
    """Dropout is off: a mask that ranks share is another mask."""
    dry = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "padded_vocab_size": 64}
    whole = launcher.run(1, "alone.jsonl", **dry)
    save = {"save": launcher.root / "other", "load": launcher.root / "other"}
    launcher.run(2, "other.jsonl", exit_interval=4, **dry, **save, **PARALLEL["pp2"][1])
    moved = launcher.run(2, "other.jsonl", **dry, **save, **PARALLEL["dp2"][1])
    for ours, theirs in zip(moved, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def worker_pids(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if str(SCRIPT) in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for_steps(launcher: Launcher, metrics: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = launcher.root / metrics
        if path.exists() and path.read_text().count("loss/final") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not begin")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through Linux's /proc")
def test_a_signal_to_one_rank_stops_all_at_the_same_step(launcher: Launcher) -> None:
    save = launcher.root / "stopped"
    process = launcher.start(2, "stopped.jsonl", train_iters=100000, save=save, **PARALLEL["pp2"][1])
    wait_for_steps(launcher, "stopped.jsonl", 2)
    os.kill(worker_pids(process)[1], signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said[-3000:]
    assert recognise(save).iteration == launcher.steps("stopped.jsonl")[-1]["iteration"]
    assert json.loads((save / "run_status.json").read_text())["reason"] == "SIGTERM received"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through Linux's /proc")
@pytest.mark.parametrize("layout", ["pp2", pytest.param("dp2", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_run_and_a_restart_goes_on(launcher: Launcher, layout: str) -> None:
    ranks, flags = PARALLEL[layout]
    whole = launcher.run(ranks, f"{layout}-undisturbed.jsonl", train_iters=40, lr_decay_iters=40, **flags)
    save = {"save": launcher.root / f"{layout}-killed", "load": launcher.root / f"{layout}-killed", "save_interval": 2}
    metrics = f"{layout}-killed.jsonl"
    process = launcher.start(ranks, metrics, "--max-restarts=1", train_iters=40, lr_decay_iters=40, **flags, **save)
    wait_for_steps(launcher, metrics, 5)
    os.kill(worker_pids(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    last = {line["iteration"]: line for line in launcher.steps(metrics)}
    assert list(last.values()) == whole
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _is_rank(pid, metrics)]


def _is_rank(pid: str, metrics: str) -> bool:
    try:
        return metrics in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
