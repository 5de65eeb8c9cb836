from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.schedule.actions import Op, Pipeline, ScheduleError, to_text
from megatron.schedule.check import check, most_in_flight, validate
from megatron.schedule.communicate import communicate
from megatron.schedule.generate import GENERATORS, gpipe, interleaved, one_f_one_b, zero_bubble_h1
from tests.unit.schedule.strategies import generated, pipelines


def is_sound(case):
    pipeline, schedule = case
    check(schedule, pipeline)
    validate(communicate(schedule), pipeline)


@settings(max_examples=60, deadline=None)
@given(generated())
def test_every_schedule_is_sound(case):
    is_sound(case)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(generated())
def test_every_schedule_is_sound_at_length(case):
    is_sound(case)


@settings(max_examples=40, deadline=None)
@given(pipelines())
def test_1f1b_holds_no_more_than_the_stages_after_it(pipeline):
    p, m = pipeline.num_ranks, pipeline.num_microbatches
    expected = [min(p - stage, m) for stage in range(p)]
    assert most_in_flight(one_f_one_b(pipeline)) == expected
    validate(communicate(one_f_one_b(pipeline)), pipeline, max_in_flight=expected)
    assert most_in_flight(gpipe(pipeline)) == [m] * p


@settings(max_examples=40, deadline=None)
@given(pipelines())
def test_zero_bubble_holds_no_more_than_the_first_stage_of_1f1b(pipeline):
    assert max(most_in_flight(zero_bubble_h1(pipeline))) <= min(pipeline.num_ranks, pipeline.num_microbatches)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["1f1b", "gpipe", "zb-h1"]))
def test_heads_run_just_before_the_backward(data, kind):
    for rank in GENERATORS[kind](data.draw(pipelines(8, 16))):
        for action, following in pairwise(rank):
            if action.op is Op.HEADS:
                assert following.op in (Op.BACKWARD, Op.INPUT)
                assert following.microbatch == action.microbatch


def test_known_schedules():
    two = Pipeline(2, 3, frozenset({1}))
    assert to_text(gpipe(two)) == "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1F2,1E0,1B0,1E1,1B1,1E2,1B2\n"
    assert to_text(one_f_one_b(two)) == "0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1E0,1B0,1F1,1E1,1B1,1F2,1E2,1B2\n"
    assert to_text(zero_bubble_h1(two)) == (
        "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2\n1F0,1E0,1I0,1F1,1E1,1I1,1W0,1F2,1E2,1I2,1W1,1W2\n"
    )
    assert to_text(interleaved(Pipeline(2, 2, frozenset({3}), 2))) == (
        "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3E0,3B0,3F1,3E1,3B1,1B0,1B1\n"
    )


def test_microbatches_that_ranks_do_not_divide():
    whole, part = (interleaved(Pipeline(4, m, frozenset({7}), 2)) for m in (8, 6))
    assert [[a for a in rank if a.microbatch < 6] for rank in whole] == [list(rank) for rank in part]


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_tuning_goes_forward_only_and_keeps_nothing(kind):
    chunks = 2 if kind == "interleaved" else 1
    pipeline = Pipeline(3, 5, frozenset({0, 1}), chunks, tuning=True)
    schedule = GENERATORS[kind](pipeline)
    validate(communicate(schedule), pipeline, max_in_flight=1)
    assert to_text(schedule).splitlines()[0] == ",".join(f"0F{m},0E{m}" for m in range(5))
    assert schedule[2] == ()


def test_what_generators_cannot_do():
    for kind in ("1f1b", "gpipe", "zb-h1"):
        with pytest.raises(ScheduleError, match=f"{kind} has one stage on each rank, not 2"):
            GENERATORS[kind](Pipeline(2, 4, frozenset({3}), 2))
    with pytest.raises(ScheduleError, match="at least 2 chunks"):
        interleaved(Pipeline(2, 4, frozenset({1})))
