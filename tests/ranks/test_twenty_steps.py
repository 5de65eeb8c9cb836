"""Twenty steps in fp32: the losses of every exit are those of one process, in every layout and schedule (row R3)."""

from functools import cache

import pytest

from megatron.parallel.mesh import ONE_RANK
from megatron.testing.layouts import losses_of_steps, toy_config
from megatron.testing.ranks import Ranks

STEPS = 20
FLAGS = "--num-layers 8 --exit-layer-nums 2 3 6 --exit-layer-weight 0.2 0.3 0.5 --lr 1e-3 --train-iters 20"
SCHEDULES = {
    "gpipe": "--pipeline-schedule gpipe",
    "1f1b": "--pipeline-schedule 1f1b",
    "interleaved": "--num-layers-per-virtual-pipeline-stage 1",
    "zb-h1": "--pipeline-schedule zb-h1",
}
FILL = "--fill-explicit-bubbles --num-fill-warmup-microbatches 2 --num-fill-cooldown-microbatches 2"
L10 = [(tp, pp, dp) for tp in (1, 2, 4) for pp in (1, 2, 4) for dp in (1, 2, 4) if tp * pp * dp <= 4]
QUICK = {("gpipe", (1, 2, 2)), ("interleaved", (1, 4, 1)), ("1f1b", (2, 1, 1)), ("zb-h1", (1, 2, 1))}


def pairs() -> list:
    """All layouts with all schedules that they can have: with one pipeline rank there is one."""
    found = []
    for kind in SCHEDULES:
        for layout in L10:
            if kind == "1f1b" or layout[1] > 1:
                marks = () if (kind, layout) in QUICK else pytest.mark.slow
                found.append(
                    pytest.param(kind, layout, marks=marks, id=f"{kind}-tp{layout[0]}pp{layout[1]}dp{layout[2]}")
                )
    return found


@cache
def alone() -> list[dict[str, float]]:
    return losses_of_steps(ONE_RANK, toy_config(*FLAGS.split()), STEPS)


def compare(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == STEPS
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-5), f"step {step}"


@pytest.mark.parametrize(("kind", "layout"), pairs())
def test_losses_are_those_of_one_process(ranks: Ranks, kind: str, layout: tuple[int, int, int]) -> None:
    tp, pp, dp = layout
    config = toy_config(*FLAGS.split(), *SCHEDULES[kind].split(), "--pipeline-model-parallel-size", str(pp))
    for answer in ranks.run(losses_of_steps, config, STEPS, tp=tp, pp=pp, dp=dp):
        compare(answer, alone())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 4}, {"pp": 4, "dp": 2}, {"tp": 2, "pp": 4, "sp": True}])
@pytest.mark.parametrize("normalization", ["unbiased", "original"])
def test_filled_losses_do_not_depend_on_the_other_axes(ranks: Ranks, normalization: str, layout: dict) -> None:
    """The objective of a filled step is its own. Data-parallel ranks see the same data here: then it is the same."""
    flags = f"{FLAGS} {FILL} --fill-loss-normalization {normalization} --pipeline-model-parallel-size 4"
    config = toy_config(*flags.split())
    first = ranks.run(losses_of_steps, config, STEPS, True, pp=4)[0]
    layout = dict(layout)
    more = ["--sequence-parallel"] if layout.pop("sp", False) else []
    more += ["--global-batch-size", str(8 * layout.get("dp", 1))]  # so that the learning rate is the same
    for answer in ranks.run(losses_of_steps, toy_config(*flags.split(), *more), STEPS, True, **layout):
        compare(answer, first)
    assert max(abs(a["final"] - b["final"]) for a, b in zip(first, alone(), strict=True)) > 1e-4


def test_the_losses_move() -> None:
    """What is compared is training, not a standstill."""
    first, *_, last = alone()
    assert all(abs(first[label] - last[label]) > 1e-2 for label in first)
