import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.schedule.actions import Action, Op, Pipeline, Schedule, ScheduleError, from_text
from megatron.schedule.communicate import communicate
from megatron.schedule.generate import gpipe, interleaved, one_f_one_b, zero_bubble_h1
from megatron.schedule.simulate import Costs, simulate
from tests.unit.schedule.strategies import everywhere, generated, stage_costs, times

UNIFORM = [Costs()] * 64


def bubble_cases(kind, sizes):
    for p, m in sizes:
        schedule = kind(Pipeline(p, m, frozenset({p - 1})))
        assert simulate(schedule, UNIFORM).bubble_share == pytest.approx((p - 1) / (m + p - 1), abs=1e-12), (p, m)


@pytest.mark.parametrize("kind", [one_f_one_b, gpipe])
def test_analytic_bubble(kind):
    """256 cases for each of the two schedules."""
    bubble_cases(
        kind, [(p, m) for p in range(1, 17) for m in (1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 20, 24, 32, 40, 48, 64)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [one_f_one_b, gpipe])
def test_analytic_bubble_everywhere(kind):
    bubble_cases(kind, [(p, m) for p in range(1, 17) for m in range(1, 65)])


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_interleaving_divides_the_bubble_by_the_chunks(p):
    for chunks in (2, 4):
        pipeline = Pipeline(p, 4 * p, frozenset({p * chunks - 1}), chunks)
        share = simulate(interleaved(pipeline), [Costs()] * p * chunks).bubble_share
        assert share == pytest.approx((p - 1) / (chunks * 4 * p + p - 1), abs=1e-12)


def zero_bubble_is_shorter(p, m, forward, of_input, weight):
    pipeline, costs = Pipeline(p, m, frozenset({p - 1})), [Costs(forward, 0, of_input, weight)] * p
    split, plain = (simulate(kind(pipeline), costs) for kind in (zero_bubble_h1, one_f_one_b))
    assert split.bubble_share < plain.bubble_share
    assert split.makespan < plain.makespan
    assert max(split.peak_memory) <= max(plain.peak_memory)


SIZES_AND_TIMES = (st.integers(2, 16), st.integers(1, 64), times, times, times)


@settings(max_examples=60, deadline=None)
@given(*SIZES_AND_TIMES)
def test_zero_bubble_is_shorter_than_1f1b(p, m, forward, of_input, weight):
    zero_bubble_is_shorter(p, m, forward, of_input, weight)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(*SIZES_AND_TIMES)
def test_zero_bubble_is_shorter_than_1f1b_at_length(p, m, forward, of_input, weight):
    zero_bubble_is_shorter(p, m, forward, of_input, weight)


def test_zero_bubble_reaches_its_formula():
    """(p - 1)(F + I - W) of idle time, arXiv 2401.10241."""
    for p, m in ((2, 4), (4, 8), (8, 32), (16, 64)):
        timeline = simulate(zero_bubble_h1(Pipeline(p, m, frozenset({p - 1}))), UNIFORM)
        assert timeline.makespan == 3 * m + p - 1


@settings(max_examples=40, deadline=None)
@given(st.data(), generated(most_ranks=6, most_microbatches=16))
def test_a_timeline_is_possible(data, case):
    """No rank does two things at a time, and nothing starts before what it takes is there."""
    _, schedule = case
    costs = data.draw(stage_costs(schedule.num_stages))
    for each in (schedule, communicate(schedule)):
        timeline = simulate(each, costs)
        ends = {span.action: span.end for rank in timeline.spans for span in rank}
        for rank, spans in enumerate(timeline.spans):
            assert [span.action for span in spans] == list(each[rank])
            assert all(a.end <= b.start for a, b in pairwise(spans))
            for (stage, op, m), start, _ in spans:
                if op is Op.FORWARD and stage:
                    message = costs[stage - 1].message if each.num_ranks > 1 else 0
                    assert start >= ends[Action(stage - 1, Op.FORWARD, m)] + message


def test_messages_take_time_and_share_a_line():
    """Two outputs leave at 1 and 2; each takes 3, one after the other: they arrive at 4 and 7."""
    pipeline = Pipeline(2, 2, frozenset({1}))
    costs = [Costs(message=3.0), Costs()]
    for schedule in (gpipe(pipeline), communicate(gpipe(pipeline))):
        spans = {str(span.action): span for rank in simulate(schedule, costs).spans for span in rank}
        assert (spans["1F0"].start, spans["1F1"].start) == (4.0, 7.0)


def test_a_message_waits_for_its_receive():
    text = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
    text += "1RECV_F0,1F0,1E0,1B0,1RECV_F1,1SEND_B0,1F1,1E1,1B1,1SEND_B1\n"
    spans = {str(s.action): s for rank in simulate(from_text(text), [Costs(message=3.0)] * 2).spans for s in rank}
    assert spans["1B0"].end == 7.0
    assert spans["1F1"].start == 10.0  # made at 2, but asked for at 7


def test_memory():
    costs = [Costs(kept=1.0, heads=0.5, heads_peak=10.0, heads_kept=0.25)] * 4
    stages = frozenset(range(4))
    # Three others in flight, and the one whose heads run.
    assert simulate(one_f_one_b(Pipeline(4, 8, stages)), costs).peak_memory == (14.0, 13.0, 12.0, 11.0)
    early = from_text("0F0,0F1,0E0,0E1,0B0,0B1\n")
    assert simulate(early, costs).peak_memory == (12.25,)
    halves = from_text("0F0,0E0,0I0,0F1,0E1,0I1,0W0,0W1\n")  # kept until W, the heads' gradients until I
    assert simulate(halves, costs).peak_memory == (12.0,)
    tuning = Pipeline(4, 8, stages, tuning=True)
    assert simulate(one_f_one_b(tuning), costs).peak_memory == (11.0,) * 4
    free = [Costs(kept=1.0, heads_kept=2.0)]
    assert simulate(from_text("0F0,0E0,0B0\n"), free).peak_memory == (3.0,)


def test_shares_of_a_timeline():
    timeline = simulate(one_f_one_b(Pipeline(2, 1, frozenset({1}))), UNIFORM)
    assert timeline.makespan == 6.0
    assert [timeline.busy(rank) for rank in (0, 1)] == [3.0, 3.0]
    assert [timeline.bubble(rank) for rank in (0, 1)] == [0.5, 0.5]
    nothing = simulate(Schedule(((),)), [])
    assert (nothing.makespan, nothing.bubble_share) == (0.0, 0.0)


def test_what_cannot_be_simulated():
    with pytest.raises(ScheduleError, match="costs of 1 stages for a schedule of 2"):
        simulate(one_f_one_b(everywhere(2, 2)), [Costs()])
    with pytest.raises(ScheduleError, match="rank 0 waits forever at 0B0"):
        simulate(from_text("0F0,0B0,0F1,0B1\n1F1,1E1,1B1,1F0,1E0,1B0\n"), UNIFORM)


@pytest.mark.slow
def test_large_schedules_take_seconds():
    schedule = one_f_one_b(everywhere(64, 512))
    begin = time.perf_counter()
    simulate(schedule, UNIFORM)
    assert time.perf_counter() - begin < 10
