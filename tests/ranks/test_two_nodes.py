"""Two nodes, which are two torchruns on this machine: the run that one of them would have made."""

import os
import signal
import subprocess
import sys

import pytest

from tests.ranks.launcher import Launcher, assert_same_state, finished, free_port, wait_for, workers

PP2: dict[str, object] = {"pipeline_model_parallel_size": 2}


def static(launcher: Launcher) -> list[list[str]]:
    """torchrun's words for two nodes that are told their numbers."""
    master = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [[*master, f"--node-rank={node}"] for node in range(2)]


def elastic(launcher: Launcher) -> list[list[str]]:
    """torchrun's words for two nodes that find each other, and start again together."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=run", "--max-restarts=3"]
    return [meeting] * 2


def run(launcher: Launcher, metrics: str, words: list[list[str]], **flags: object) -> list[dict]:
    for process in launcher.start_nodes(metrics, words, **PP2, **flags):
        finished(process)
    return launcher.steps(metrics)


@pytest.mark.parametrize("meeting", [static, pytest.param(elastic, marks=pytest.mark.slow)])
def test_they_train_and_resume_like_one_node_bit_for_bit(launcher: Launcher, meeting) -> None:
    """The pipeline crosses the nodes' border."""
    name = meeting.__name__
    whole = launcher.run(2, f"{name}-one.jsonl", save=launcher.root / f"{name}-one", **PP2)
    save = launcher.root / f"{name}-two"
    again = {"save": save, "load": save}
    first = run(launcher, f"{name}.jsonl", meeting(launcher), exit_interval=3, **again)
    assert [line["iteration"] for line in first] == [1, 2, 3]
    assert run(launcher, f"{name}.jsonl", meeting(launcher), **again) == whole
    assert_same_state(save, launcher.root / f"{name}-one")


def kill_one(launcher: Launcher, processes: list[subprocess.Popen], metrics: str) -> None:
    launcher.wait_for_steps(processes[0], metrics, 5)
    ranks = workers(launcher.root / metrics)
    os.kill(ranks[1], signal.SIGKILL)
    took = wait_for(lambda: not set(ranks.values()) & set(workers(launcher.root / metrics).values()), "a rank is left")
    assert took < 30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through Linux's /proc")
def test_a_rank_that_dies_on_one_ends_both(launcher: Launcher) -> None:
    flags = {"train_iters": 100000, "save": launcher.root / "dies", **PP2}
    processes = launcher.start_nodes("dies.jsonl", static(launcher), **flags)
    kill_one(launcher, processes, "dies.jsonl")
    said = finished(processes[0], code=1)
    assert "error: rank 0 (dp=0 pp=0 tp=0) lost contact with rank 1 (dp=0 pp=1 tp=0, its peer along pp)" in said
    assert "exitcode  : 6" in said
    finished(processes[1], code=1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through Linux's /proc")
def test_both_start_again_and_go_on(launcher: Launcher) -> None:
    length = {"train_iters": 40, "lr_decay_iters": 40, **PP2}
    whole = launcher.run(2, "whole.jsonl", save=launcher.root / "whole", **length)
    save = launcher.root / "again"
    flags = {"save": save, "load": save, "save_interval": 2, **length}
    processes = launcher.start_nodes("again.jsonl", elastic(launcher), **flags)
    kill_one(launcher, processes, "again.jsonl")
    for process in processes:
        finished(process)
    assert list({line["iteration"]: line for line in launcher.steps("again.jsonl")}.values()) == whole
    assert_same_state(save, launcher.root / "whole")
