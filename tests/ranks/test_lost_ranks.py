"""A rank that dies, hangs or cannot go on: the others end within seconds, say who it was, and a restart goes on."""

import os
import random
import signal
import sys
import time

import pytest

from megatron.checkpoint.find import recognise
from megatron.data.indexed import IndexedDataset
from tests.ranks.launcher import PARALLEL, Launcher, alive, assert_same_state, finished, free_port, wait_for, workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through Linux's /proc")

LENGTH = {"train_iters": 40, "lr_decay_iters": 40}
KILLS = [pytest.param(number, marks=() if number == 0 else pytest.mark.slow) for number in range(20)]


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher):
    """Layout -> the steps of a run that nobody disturbed; made when first asked for. Its name is `<layout>-whole`."""
    made: dict[str, list[dict]] = {}

    def get(layout: str) -> list[dict]:
        if layout not in made:
            ranks, flags = PARALLEL[layout]
            save = launcher.root / f"{layout}-whole"
            made[layout] = launcher.run(ranks, f"{layout}-whole.jsonl", save=save, **LENGTH, **flags)
        return made[layout]

    return get


@pytest.mark.parametrize("number", KILLS)
def test_killed_and_started_again_it_is_the_undisturbed_run(launcher: Launcher, undisturbed, number: int) -> None:
    chance = random.Random(number)
    layout = ("pp2", "dp2", "tp2")[number % 3]
    (ranks, flags), victim, step = PARALLEL[layout], chance.randrange(2), chance.randrange(1, 36)
    whole = undisturbed(layout)
    save, metrics = launcher.root / f"kill-{number}", f"kill-{number}.jsonl"
    again = {"save": save, "load": save, "save_interval": 3}
    process = launcher.start(ranks, metrics, "--max-restarts=3", **LENGTH, **flags, **again)
    launcher.wait_for_steps(process, metrics, step)
    time.sleep(chance.random() * 0.05)  # anywhere in a step, or in a save
    before = workers(launcher.root / metrics)
    os.kill(before[victim], signal.SIGKILL)
    took = wait_for(lambda: not any(map(alive, before.values())), "a rank of the first start is left")
    said = finished(process)
    assert took < 30
    survivor, lost = 1 - victim, f"rank {victim} (dp=0 pp=0 tp=0)".replace(f"{layout[:2]}=0", f"{layout[:2]}={victim}")
    assert f"] rank {survivor} (" in said or f"error: rank {survivor} (" in said, said[-5000:]
    assert f"lost contact with {lost[:-1]}, its peer along {layout[:2]})" in said, said[-5000:]
    assert list({line["iteration"]: line for line in launcher.steps(metrics)}.values()) == whole
    assert_same_state(save, launcher.root / f"{layout}-whole")
    assert not workers(launcher.root / metrics)


@pytest.mark.parametrize(("layout", "grace"), [("dp2", 15), pytest.param("pp2dp2", 5, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_others_in_time(launcher: Launcher, layout: str, grace: int) -> None:
    """`grace`: seconds after the timeout; the smaller figure is for a machine that does nothing else."""
    (ranks, flags), minutes, metrics = PARALLEL[layout], 0.15, f"{layout}-hangs.jsonl"
    process = launcher.start(ranks, metrics, train_iters=100000, distributed_timeout_minutes=minutes, **flags)
    launcher.wait_for_steps(process, metrics, 3)
    running = workers(launcher.root / metrics)
    stopped = running.pop(1)
    os.kill(stopped, signal.SIGSTOP)
    took = wait_for(lambda: not any(map(alive, running.values())), "a rank still waits for the one that hangs")
    if layout == "dp2":  # torchrun does it after 30 seconds, which the other layout waits for
        os.kill(stopped, signal.SIGKILL)
    said = finished(process, code=1)
    assert took < minutes * 60 + grace
    assert not alive(stopped)
    for rank in running:
        start = f"error: {f'[rank {rank}] ' if rank else ''}rank {rank} ("
        mine = next((line for line in said.splitlines() if start in line), said[-5000:])
        assert "lost contact with rank 1 (dp=1 pp=0 tp=0" in mine
        assert "longer than" not in mine
    assert "exitcode  : 6" in said


@pytest.mark.slow
def test_all_being_alive_is_said(launcher: Launcher) -> None:
    """One that is merely slow is not called lost."""
    env = {"EE_LLM_FAULTS": "commit.manifest:delay=12"}
    flags = {"distributed_timeout_minutes": 0.15, "save_interval": 2, "save": launcher.root / "slow"}
    process = launcher.start(2, "slow.jsonl", env=env, **flags, **PARALLEL["pp2"][1])
    said = finished(process, code=1)
    assert "rank 1 (dp=0 pp=1 tp=0) waited for another one for longer than --distributed-timeout-minutes" in said


def test_a_sample_that_one_rank_cannot_read_ends_all_with_a_checkpoint(launcher: Launcher) -> None:
    broken = Launcher(launcher.root / "broken")
    break_a_token(broken)
    alone, save = broken.root / "alone", broken.root / "together"
    said = finished(broken.start(1, "alone.jsonl", save=alone), code=2)
    reason = said[said.index("error: ") + len("error: ") :].splitlines()[0]
    said = finished(broken.start(2, "together.jsonl", save=save, **PARALLEL["dp2"][1]), code=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors in ([f"error: rank {rank} (dp={rank} pp=0 tp=0): {reason}"] for rank in range(2)), said[-3000:]
    steps = broken.steps("together.jsonl")
    assert 0 < len(steps) < 8
    assert [line["iteration"] for line in steps] == [line["iteration"] for line in broken.steps("alone.jsonl")]
    assert recognise(save).iteration == recognise(alone).iteration == len(steps)


def break_a_token(launcher: Launcher) -> None:
    """One token that no vocabulary has, where the run comes by after some steps."""
    indexed = IndexedDataset(str(launcher.corpus))
    with open(indexed.bin_path, "r+b") as file:
        file.seek(indexed.byte_offset(30, 2))
        file.write(b"\xff\xff")


def test_a_rank_that_cannot_be_built_ends_the_others_at_once(launcher: Launcher) -> None:
    """On another node: torchrun there does not end this one's processes."""
    both = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    fits: dict[str, object] = PARALLEL["pp2"][1]
    first = launcher.start(1, "first.jsonl", *both, "--node-rank=0", **fits)
    second = launcher.start(1, "second.jsonl", *both, "--node-rank=1", hidden_size=1 << 18, **fits)
    said = finished(second, code=1)
    assert "error: [rank 1] a model of these sizes does not fit into memory" in said
    took = wait_for(lambda: not workers(launcher.root / "first.jsonl"), "it waits for one that will never come")
    assert took < 10
    assert "error: rank 0 waits in vain for rank 1, which ended before training began" in finished(first, code=1)
