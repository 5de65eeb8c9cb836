import pytest
from hypothesis import given, settings

from megatron.schedule.actions import Action, Flow, Op, Pipeline, Schedule, ScheduleError, from_text, other_end, to_text
from megatron.schedule.communicate import communicate
from megatron.schedule.generate import gpipe, one_f_one_b
from tests.unit.schedule.strategies import everywhere, generated


@settings(max_examples=25, deadline=None)
@given(generated(most_ranks=8, most_microbatches=16))
def test_text_gives_the_schedule_back(case):
    _, schedule = case
    for each in (schedule, communicate(schedule)):
        assert from_text(to_text(each)) == each


def test_text_form():
    assert to_text(one_f_one_b(everywhere(1, 2))) == "0F0,0E0,0B0,0F1,0E1,0B1\n"
    assert to_text(gpipe(everywhere(1, 2))) == "0F0,0F1,0E0,0B0,0E1,0B1\n"
    assert from_text("0F0, 0SEND_F0\n1RECV_F0,1F0") == Schedule.of(
        [
            [Action(0, Op.FORWARD, 0), Action(0, Op.SEND_F, 0)],
            [Action(1, Op.RECV_F, 0), Action(1, Op.FORWARD, 0)],
        ]
    )
    assert Action.parse(" 3E12 ") == Action(3, Op.HEADS, 12)
    assert [str(Action.parse(word)) for word in ("1I2", "1W2", "0R1", "5D7", "1RECV_B0", "2SEND_B0")] == [
        "1I2", "1W2", "0R1", "5D7", "1RECV_B0", "2SEND_B0",
    ]  # fmt: skip


def test_text_without_sense_is_named_with_its_place():
    with pytest.raises(ScheduleError, match=r"line 2, word 3: '0X1' is not an action: expected <stage><one of F, E, B"):
        from_text("0F0\n1F0,1E0,0X1\n")


def test_a_rank_may_be_idle():
    text = "0F0,0E0\n\n"
    assert from_text(text).num_ranks == 2
    assert to_text(from_text(text)) == text
    assert from_text("0F0,,0E0, \n,,,\n") == from_text(text)


def test_what_a_schedule_says_of_itself():
    schedule = communicate(one_f_one_b(everywhere(4, 6)))
    assert (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches) == (4, 4, 6)
    assert len(schedule) == 4 and schedule[3] == list(schedule)[3]
    assert schedule.rank_of(6) == 2
    assert schedule.has_messages and not schedule.computes().has_messages
    assert schedule.computes() == one_f_one_b(everywhere(4, 6))
    assert Schedule(()).num_stages == Schedule(()).num_microbatches == 0


def test_messages_know_their_other_end():
    send = Action(1, Op.SEND_B, 4)
    assert other_end(send) == Action(0, Op.RECV_B, 4)
    assert other_end(other_end(send)) == send


def test_what_neighbours_hand_over_follows_from_the_computes():
    flow = Flow.of(from_text("0F0,0B0,0F1,0D1\n1F0,1B0,1F1,1B1\n"))
    assert flow.makes(Action(0, Op.FORWARD, 1)) == Action(0, Op.SEND_F, 1)
    assert flow.makes(Action(1, Op.BACKWARD, 1)) is None  # dropped below
    assert flow.needs(Action(0, Op.BACKWARD, 0)) == Action(0, Op.RECV_B, 0)
    assert flow.needs(Action(1, Op.BACKWARD, 0)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, frozenset({0})), "at least 1, not 0, 4 and 1"),
        ((2, 4, frozenset({1, 2})), "head on stage 2, but the stages are 0 to 1"),
        ((2, 4, frozenset({0})), "the last stage, 1, has the final head"),
        ((2, 4, frozenset(), 1, True), "tuning exits needs a stage with an exit"),
    ],
)
def test_pipelines_that_cannot_be(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Pipeline(*arguments)


def test_under_tuning_nothing_runs_beyond_the_last_exit():
    pipeline = Pipeline(4, 8, frozenset({1, 4}), chunks=2, tuning=True)
    assert (pipeline.num_stages, pipeline.active_stages) == (8, 5)
    assert [list(pipeline.stages_of(rank)) for rank in range(4)] == [[0, 4], [1], [2], [3]]
