from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.schedule.actions import (
    SENDS,
    Action,
    Op,
    Pipeline,
    Schedule,
    ScheduleError,
    from_text,
    other_end,
    to_text,
)
from megatron.schedule.check import validate
from megatron.schedule.communicate import add_reductions, communicate
from megatron.schedule.generate import alternate, gpipe, interleaved, one_f_one_b, zero_bubble_h1
from tests.unit.schedule.strategies import everywhere, finishes, generated, pipelines, shuffled


@settings(max_examples=60, deadline=None)
@given(pipelines(most_ranks=5, most_microbatches=6), st.integers(0, 2**32))
def test_any_order_of_computes_runs(pipeline, seed):
    schedule = shuffled(pipeline, seed)
    full = communicate(schedule)
    assert full.computes() == schedule
    validate(full, pipeline)
    assert finishes(full, pipeline)


@settings(max_examples=30, deadline=None)
@given(st.data(), pipelines(most_ranks=5, most_microbatches=40))
def test_receives_are_posted_as_early_as_blocking_sends_need(data, pipeline):
    """Ranks that warm up with many forwards meet ranks that send gradients back at once."""
    p, warmups = pipeline.num_ranks, [0]
    while len(warmups) < p:
        warmups.insert(0, warmups[0] + data.draw(st.integers(1, 20)))
    microbatches = range(pipeline.num_microbatches)
    schedule = Schedule.of(alternate(pipeline, stage, microbatches, warmups[stage]) for stage in range(p))
    validate(communicate(schedule), pipeline)


def test_a_receive_far_ahead_of_its_use():
    """Rank 0 runs all forwards before the first backward, rank 1 sends its gradient at once."""
    pipeline = Pipeline(2, 12, frozenset({1}))
    full = communicate(Schedule.of([gpipe(pipeline)[0], one_f_one_b(pipeline)[1]]))
    validate(full, pipeline)
    first = full[0]
    post, use = first.index(Action(0, Op.RECV_B, 0)), first.index(Action(0, Op.BACKWARD, 0))
    assert sum(action.op is Op.FORWARD for action in first[post:use]) > 4


@settings(max_examples=30, deadline=None)
@given(generated(most_ranks=8, most_microbatches=24))
def test_a_send_follows_what_makes_the_message(case):
    _, schedule = case
    for rank in communicate(schedule):
        for before, action in pairwise(rank):
            if action.op in SENDS:
                assert (before.stage, before.microbatch) == (action.stage, action.microbatch)
                assert before.op in ((Op.FORWARD,) if action.op is Op.SEND_F else (Op.BACKWARD, Op.INPUT))


def test_1f1b_with_messages():
    assert to_text(communicate(one_f_one_b(Pipeline(2, 2, frozenset({1}))))).splitlines() == [
        "0F0,0SEND_F0,0RECV_B0,0F1,0SEND_F1,0RECV_B1,0B0,0B1",
        "1RECV_F0,1F0,1E0,1RECV_F1,1B0,1SEND_B0,1F1,1E1,1B1,1SEND_B1",
    ]


def test_stages_on_one_rank_need_no_messages():
    assert not communicate(interleaved(Pipeline(1, 3, frozenset({1}), 2))).has_messages


def test_one_queue_from_rank_to_rank():
    """With two ranks, outputs and gradients of several stages go the same way: receives in the order of the sends."""
    schedule = communicate(interleaved(Pipeline(2, 4, frozenset({3}), 2)))
    sent = [other_end(action) for action in schedule[0] if action.op in SENDS]
    assert sent == [action for action in schedule[1] if action.op in (Op.RECV_F, Op.RECV_B)]
    assert {action.op for action in sent} == {Op.RECV_F, Op.RECV_B}


def test_computes_in_a_circle():
    with pytest.raises(
        ScheduleError, match=r"wait for each other in a circle\nrank 0: .* 0B0 <-- HERE, waits for 1SEND_B0"
    ):
        communicate(from_text("0F0,0B0,0F1,0B1\n1F1,1E1,1B1,1F0,1E0,1B0\n"))


def test_messages_are_added_once():
    with pytest.raises(ScheduleError, match="has messages already"):
        communicate(communicate(one_f_one_b(everywhere(2, 2))))


def test_buckets_are_reduced_after_the_last_that_adds_to_them():
    schedule = one_f_one_b(Pipeline(2, 2, frozenset({1})))
    expected = [
        "0F0,0SEND_F0,0RECV_B0,0F1,0SEND_F1,0RECV_B1,0B0,0B1,0R0,0R1",
        "1RECV_F0,1F0,1E0,1RECV_F1,1B0,1SEND_B0,1F1,1E1,1R1,1B1,1SEND_B1,1R0",
    ]
    assert to_text(communicate(add_reductions(schedule, {0: 2, 1: 1}, {1: 1}))).splitlines() == expected
    assert to_text(add_reductions(communicate(schedule), {0: 2, 1: 1}, {1: 1})).splitlines() == expected
    split = add_reductions(zero_bubble_h1(Pipeline(2, 2, frozenset({1}))), {0: 1, 1: 1})
    assert to_text(split).splitlines()[1].endswith("1W0,1W1,1R0")
    assert add_reductions(schedule, {0: 0}) == schedule


def test_no_bucket_without_gradients():
    schedule = one_f_one_b(Pipeline(2, 2, frozenset({1})))
    with pytest.raises(ScheduleError, match="stage 0 makes no gradients for a bucket: it has no heads"):
        add_reductions(schedule, {}, {0: 1})
    tuning = one_f_one_b(Pipeline(2, 2, frozenset({1}), tuning=True))
    with pytest.raises(ScheduleError, match="stage 0 makes no gradients for a bucket: it has no backward"):
        add_reductions(tuning, {0: 1})
