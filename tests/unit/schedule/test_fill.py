from dataclasses import astuple

import pytest
from hypothesis import given, settings

from megatron.schedule.actions import Flow, Op, Pipeline, ScheduleError
from megatron.schedule.check import validate
from megatron.schedule.communicate import communicate
from megatron.schedule.fill import fill_bubbles, filler_depths, most_fillers, stage_fill
from megatron.schedule.generate import one_f_one_b
from tests.unit.schedule.strategies import filled

EVERYWHERE = frozenset(range(4))


def ops(schedule, stage):
    return " ".join(f"{action.op.value}{action.microbatch}" for action in schedule[stage])


def test_the_papers_example():
    """P = 4, r = 2: counts by hand; all recorded counts are compared in tests/golden."""
    assert [most_fillers(p) for p in (1, 2, 3, 4, 6, 8, 16)] == [0, 0, 1, 2, 3, 4, 10]
    counts = [stage_fill(4, stage, 2, 2) for stage in range(4)]
    assert [c.partial_forwards for c in counts] == [2, 1, 0, 0]
    assert [c.partial_backwards for c in counts] == [0, 0, 1, 2]
    assert [c.warmup_forwards for c in counts] == [4, 3, 2, 1]
    assert [c.cooldown_backwards for c in counts] == [2, 1, 1, 1]
    assert astuple(counts[0])[2] == 1 and astuple(counts[3])[4] == 1


def test_the_papers_schedule():
    schedule = fill_bubbles(Pipeline(4, 8, EVERYWHERE), 2, 2)
    assert ops(schedule, 0) == "F0 F1 F2 F3 F4 F5 E5 B5 E4 B4 E0 B0 F6 D6 E1 B1 F7 D7 E2 B2 E3 B3"
    assert ops(schedule, 1) == "F0 F1 F2 F4 E4 B4 E0 B0 F3 E1 B1 F6 D6 E2 B2 F7 D7 E3 B3"
    assert ops(schedule, 2) == "F0 F1 E0 B0 F2 E1 B1 F3 E2 B2 F6 E3 B3 F7 D7 E6 B6"
    assert ops(schedule, 3) == "F0 E0 B0 F1 E1 B1 F2 E2 B2 F3 E3 B3 F6 E6 B6 F7 E7 B7"


@settings(max_examples=60, deadline=None)
@given(filled())
def test_filled_schedules_are_sound_and_count_as_they_should(case):
    pipeline, schedule = case
    validate(communicate(schedule), pipeline)
    flow, p = Flow.of(schedule), pipeline.num_ranks
    partial = {m for stage, m in flow.forwards} - {m for stage, m in flow.forwards if stage == p - 1}
    assert partial == set(range(p, p + len(partial)))  # the warm-up fillers' identities
    for m in partial:
        depth = max(stage for stage, other in flow.forwards if other == m)
        assert depth in pipeline.heads
    drops = {(a.stage, a.microbatch) for rank in schedule for a in rank if a.op is Op.DROP}
    dropped = {m for _, m in drops}
    assert dropped == set(range(pipeline.num_microbatches - len(dropped), pipeline.num_microbatches))


@settings(max_examples=60, deadline=None)
@given(filled())
def test_counts_are_those_of_the_formulas_where_all_stages_have_exits(case):
    pipeline, _ = case
    p, m = pipeline.num_ranks, pipeline.num_microbatches
    fillers = min(most_fillers(p), max(0, m - p) // 2)
    schedule = fill_bubbles(Pipeline(p, m, frozenset(range(p))), fillers, fillers)
    for stage in range(p):
        counts = stage_fill(p, stage, fillers, fillers)
        partial = sum(a.op is Op.FORWARD and p <= a.microbatch < p + fillers for a in schedule[stage])
        assert partial == counts.partial_forwards
        dropped = sum(a.op is Op.DROP for a in schedule[stage])
        assert dropped == fillers - counts.partial_backwards


def test_exits_on_some_stages():
    """A filler goes to the last exit on its way; without one it stays whole, and so does nothing to the schedule."""
    depths = {
        heads: filler_depths(Pipeline(8, 32, frozenset(heads) | {7}), 4)
        for heads in ((0, 1, 2, 3, 4, 5, 6), (0,), (1,), (0, 2), (3,), (4,), ())
    }
    assert depths == {
        (0, 1, 2, 3, 4, 5, 6): [3, 2, 1, 0],
        (0,): [0, 0, 0, 0],
        (1,): [1, 1, 1],
        (0, 2): [2, 2, 0, 0],
        (3,): [3],
        (4,): [],
        (): [],
    }
    assert fill_bubbles(Pipeline(4, 3, frozenset({3})), 2, 0) == one_f_one_b(Pipeline(4, 3, frozenset({3})))


def test_the_ratio_is_honoured():
    pipeline = Pipeline(4, 12, EVERYWHERE)
    assert fill_bubbles(pipeline, 2, 2, ratio=1.0) != fill_bubbles(pipeline, 2, 2, ratio=2.0)
    assert filler_depths(pipeline, 9, ratio=1.0) == [0]
    assert filler_depths(pipeline, 9, ratio=2.0) == [1, 0]


@pytest.mark.parametrize(
    ("pipeline", "counts", "message"),
    [
        (Pipeline(4, 7, EVERYWHERE), (2, 2), "7 microbatches are too few for 2 warm-up and 2 cool-down fillers on 4"),
        (Pipeline(4, 8, EVERYWHERE, tuning=True), (1, 1), "not tuning"),
        (Pipeline(2, 8, EVERYWHERE, 2), (1, 1), "one chunk"),
        (Pipeline(4, 8, EVERYWHERE), (-1, 0), "0 or more, not -1 and 0"),
    ],
)
def test_what_cannot_be_filled(pipeline, counts, message):
    with pytest.raises(ScheduleError, match=message):
        fill_bubbles(pipeline, *counts)
    with pytest.raises(ScheduleError, match="above 0, not 0"):
        fill_bubbles(Pipeline(4, 8, EVERYWHERE), 1, 1, ratio=0)
