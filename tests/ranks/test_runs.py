"""Whole runs of several ranks by torchrun: resumed, in the same layout and in another, and stopped by signals."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.find import iterations, recognise
from tests.ranks.launcher import PARALLEL, Launcher, finished, wait_for, workers

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through Linux's /proc")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "tp2", "dp2"])
def test_resumed_in_the_same_layout_bit_for_bit(launcher: Launcher, layout: str) -> None:
    """Of pp2, test_two_nodes.py has a faster one."""
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


def signal_process(process: subprocess.Popen, number: int) -> None:
    os.kill(process.pid, number)


def signal_group(process: subprocess.Popen, number: int) -> None:
    os.killpg(process.pid, number)


def reach_training(launcher: Launcher, process: subprocess.Popen, metrics: str, save: Path) -> None:
    launcher.wait_for_steps(process, metrics, 2)


def reach_save(launcher: Launcher, process: subprocess.Popen, metrics: str, save: Path) -> None:
    wait_for(lambda: any(save.glob("iter_*.staging-*/*")) or process.poll() is not None, "nothing was saved")


def reach_evaluation(launcher: Launcher, process: subprocess.Popen, metrics: str, save: Path) -> None:
    """The third step is the last one before an evaluation that doesn't end by itself."""
    launcher.wait_for_steps(process, metrics, 3)


# How a run comes to where the signal meets it: flags and environment, and how the test knows.
MOMENTS = {
    "training": ({}, {}, reach_training),
    "save": ({"save_interval": 2}, {"EE_LLM_FAULTS": "commit.manifest@1:delay=3"}, reach_save),
    "evaluation": ({"train_iters": 6, "eval_interval": 3, "eval_iters": 5000}, {}, reach_evaluation),
}
TARGETS = {"torchrun": signal_process, "group": signal_group}
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
QUICK = {("SIGTERM", "torchrun", "save"), ("SIGINT", "group", "evaluation")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(SIGNALS, TARGETS, MOMENTS)
]


@ON_LINUX
@pytest.mark.parametrize(("name", "target", "moment"), CASES)
def test_a_signal_to_torchrun_stops_at_the_steps_border(
    launcher: Launcher, name: str, target: str, moment: str
) -> None:
    """torchrun hands it on once; every rank ends with 0, after one checkpoint of the last step."""
    tag = f"{name}-{target}-{moment}"
    save, metrics, (flags, env, reach) = launcher.root / tag, f"{tag}.jsonl", MOMENTS[moment]
    flags = {"train_iters": 100000, "save": save, **PARALLEL["pp2"][1]} | flags
    process = launcher.start(2, metrics, env=env, **flags)
    reach(launcher, process, metrics, save)
    TARGETS[target](process, SIGNALS[name])
    said, _ = process.communicate(timeout=60)
    assert not workers(launcher.root / metrics)
    status = json.loads((save / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["reason"]) == ("ended", 0, f"{name} received"), said[-3000:]
    last = launcher.steps(metrics)[-1]["iteration"]
    assert status["iteration"] == recognise(save).iteration == last
    assert "\nerror: " not in said, said[-3000:]  # torchrun itself ends with a traceback that names the signal
    saved_before = {2} if moment == "save" else set()
    assert set(iterations(save)) == saved_before | {last}


@ON_LINUX
def test_a_signal_to_one_rank_stops_all_at_the_same_step(launcher: Launcher) -> None:
    save, metrics = launcher.root / "stopped", "stopped.jsonl"
    process = launcher.start(2, metrics, train_iters=100000, save=save, **PARALLEL["pp2"][1])
    launcher.wait_for_steps(process, metrics, 2)
    os.kill(workers(launcher.root / metrics)[1], signal.SIGTERM)
    finished(process)
    assert recognise(save).iteration == launcher.steps(metrics)[-1]["iteration"]
    assert json.loads((save / "run_status.json").read_text())["reason"] == "SIGTERM received"
