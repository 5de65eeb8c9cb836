"""A fault on one rank only, before each file operation of a save by several: one error on all ranks, and no wait."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron import faults
from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.config.run import RunConfig
from megatron.errors import EELLMError
from megatron.parallel.mesh import Mesh
from megatron.testing.layouts import build, toy_config
from megatron.testing.ranks import Ranks
from megatron.train import checkpoints

LAYOUTS = {"pp2": {"pp": 2}, "tp2": {"tp": 2}, "dp2": {"dp": 2}, "pp2dp2": {"pp": 2, "dp": 2}}
FLAGS = "--exit-layer-nums 1 3 --exit-layer-weight 0.25 0.5 --use-distributed-optimizer"
ACTIONS = ("enospc", "raise")


def points_passed(mesh: Mesh, config: RunConfig) -> list[str]:
    """The points that this rank passes when a checkpoint is replaced by another of its iteration."""
    trainer = build(mesh, config, torch.float32)
    checkpoints.save(trainer)
    with faults.armed() as passed:
        checkpoints.save(trainer)
    return list(passed)


def saves_with_faults(mesh: Mesh, config: RunConfig, cases: list[tuple[int, str]]) -> list[dict]:
    """One save each with a fault on the given rank alone: how it ended, and what a save without any leaves then."""
    trainer = build(mesh, config, torch.float32)
    checkpoints.save(trainer)
    answers = []
    for number, (rank, words) in enumerate(cases):
        trainer.progress.consumed_samples = number + 1
        began, ended = time.monotonic(), "saved"
        try:
            with faults.armed(words if mesh.world_rank == rank else ""):
                checkpoints.save(trainer)
        except (EELLMError, RuntimeError) as error:
            ended = f"{type(error).__name__}: {error}"
        answers.append({"ended": ended, "seconds": time.monotonic() - began, "left": left(mesh, config)})
    with faults.armed():
        checkpoints.save(trainer)
    return [*answers, {"ended": "saved", "seconds": 0.0, "left": left(mesh, config)}]


def left(mesh: Mesh, config: RunConfig) -> int | None:
    """Consumed samples of the checkpoint that a restart would find now, whose files have been verified."""
    if not mesh.is_main:
        return None
    root = Path(config.checkpoint.save)
    assert not list(root.glob("*.staging-*"))
    return native.read_facts(recognise(root).directory)["consumed_samples"]


def spread(times: int) -> list[int]:
    """All of so many passings; of the thousands of small writes twenty, the first and the last among them."""
    return sorted({round(number * (times - 1) / 19) for number in range(20)}) if times > 20 else list(range(times))


def check(ranks: Ranks, directory: Path, layout: str, actions: tuple[str, ...], every: bool) -> int:
    """Faults on each rank at the first passing of each point, or at every one; returns how many there were."""
    config = toy_config(*FLAGS.split(), "--save", str(directory))
    passed = [Counter(names) for names in ranks.run(points_passed, config, **LAYOUTS[layout])]
    cases = [
        (rank, f"{name}@{number + 1}:{action}")
        for rank, names in enumerate(passed)
        for name, times in names.items()
        for number in (spread(times) if every else [0])
        for action in actions
    ]
    answers = ranks.run(saves_with_faults, config, cases, timeout=500, **LAYOUTS[layout])
    before = 0
    for number, (case, *told) in enumerate(zip(cases, *answers, strict=False)):
        assert len({answer["ended"].removeprefix("RuntimeError: ") for answer in told}) == 1, (case, told)
        assert max(answer["seconds"] for answer in told) < 5, (case, told)
        survived = case[1].startswith("commit.drop_replaced") and "enospc" in case[1]
        assert survived == (told[0]["ended"] == "saved"), (case, told)
        assert told[0]["left"] in (before, number + 1), (case, told)
        before = told[0]["left"]
    assert answers[0][-1]["left"] == len(cases)
    return len(cases)


def test_every_point_once_on_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    assert check(ranks, tmp_path, "pp2", ("enospc",), every=False) > 15


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_point_on_each_rank_at_each_passing(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    assert check(ranks, tmp_path, layout, ACTIONS, every=True) > 60
