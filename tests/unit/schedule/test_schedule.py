import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.schedule.actions import Action, Op, ScheduleError, from_text, to_text
from megatron.schedule.check import check
from megatron.schedule.generate import GENERATORS, gpipe, one_f_one_b

SIZES = {"stages": st.integers(1, 8), "microbatches": st.integers(1, 16)}


@given(kind=st.sampled_from(sorted(GENERATORS)), **SIZES)
def test_generated_schedules_are_complete_and_round_trip(kind, stages, microbatches):
    schedule = GENERATORS[kind](stages, microbatches)
    check(schedule, microbatches)
    assert from_text(to_text(schedule)) == schedule


@given(data=st.data(), **SIZES)
def test_a_dropped_or_swapped_action_is_caught(data, stages, microbatches):
    schedule = [list(rank) for rank in one_f_one_b(stages, microbatches)]
    rank = data.draw(st.sampled_from(schedule))
    place = data.draw(st.integers(0, len(rank) - 1))
    dropped = rank.pop(place)
    with pytest.raises(ScheduleError, match=str(dropped)):
        check(tuple(map(tuple, schedule)), microbatches)


@given(**SIZES)
def test_1f1b_holds_no_more_than_the_stages_after_it(stages, microbatches):
    for stage, rank in enumerate(one_f_one_b(stages, microbatches)):
        alive = most = 0
        for action in rank:
            alive += {Op.FORWARD: 1, Op.BACKWARD: -1}.get(action.op, 0)
            most = max(most, alive)
        assert most <= min(stages - stage, microbatches)


def test_text_form():
    assert to_text(one_f_one_b(1, 2)) == "0F0,0E0,0B0,0F1,0E1,0B1"
    assert to_text(gpipe(1, 2)) == "0F0,0F1,0E0,0B0,0E1,0B1"
    assert Action.parse(" 3E12 ") == Action(3, Op.HEADS, 12)
    with pytest.raises(ScheduleError, match="'0X1' is not an action"):
        Action.parse("0X1")


def test_order_and_repetition_are_checked():
    with pytest.raises(ScheduleError, match="0E0 stands before 0F0"):
        check(from_text("0E0,0F0,0B0"), 1)
    with pytest.raises(ScheduleError, match="more than once"):
        check(from_text("0F0,0F0,0E0,0B0"), 1)
    with pytest.raises(ScheduleError, match="beyond the step's 1 microbatches"):
        check(from_text("0F0,0E0,0B0,0F1"), 1)
