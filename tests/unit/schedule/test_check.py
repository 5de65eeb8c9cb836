import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.schedule.actions import Op, Pipeline, Schedule, ScheduleError, from_text
from megatron.schedule.check import check, most_in_flight, validate
from megatron.schedule.communicate import add_reductions, communicate
from megatron.schedule.generate import one_f_one_b
from tests.unit.schedule.strategies import finishes, generated

SMALL = {"most_ranks": 4, "most_microbatches": 8}
# Operations on one microbatch at one stage, the second of which builds on the first.
BUILDS_ON = [
    {Op.RECV_F, Op.FORWARD},
    {Op.RECV_B, Op.BACKWARD},
    {Op.RECV_B, Op.INPUT},
    {Op.FORWARD, Op.SEND_F},
    {Op.FORWARD, Op.HEADS},
    {Op.FORWARD, Op.BACKWARD},
    {Op.FORWARD, Op.INPUT},
    {Op.FORWARD, Op.DROP},
    {Op.SEND_F, Op.DROP},
    {Op.SEND_F, Op.BACKWARD},
    {Op.HEADS, Op.BACKWARD},
    {Op.HEADS, Op.INPUT},
    {Op.INPUT, Op.WEIGHT},
    {Op.BACKWARD, Op.SEND_B},
    {Op.INPUT, Op.SEND_B},
]
ONE, TWO = Pipeline(1, 1, frozenset({0})), Pipeline(2, 2, frozenset({1}))


def caught(schedule: Schedule, pipeline: Pipeline, **buckets) -> bool:
    try:
        validate(schedule, pipeline, **buckets)
    except ScheduleError:
        return True
    return False


def with_buckets(pipeline: Pipeline, schedule: Schedule) -> tuple[Schedule, dict]:
    layers = {} if pipeline.tuning else {stage: 2 for stage in range(pipeline.num_stages)}
    buckets = {"buckets": layers, "head_buckets": {stage: 1 for stage in pipeline.heads}}
    return communicate(add_reductions(schedule, **buckets)), buckets


def mutants(schedule: Schedule):
    """Each action once dropped and once doubled."""
    for rank, actions in enumerate(schedule):
        for place, action in enumerate(actions):
            for changed in ([], [action, action]):
                mutant = [*actions[:place], *changed, *actions[place + 1 :]]
                yield Schedule.of([mutant if r == rank else list(other) for r, other in enumerate(schedule)])


def swapped(schedule: Schedule, rank: int, first: int, second: int) -> Schedule:
    actions = list(schedule[rank])
    actions[first], actions[second] = actions[second], actions[first]
    return Schedule.of([actions if r == rank else list(other) for r, other in enumerate(schedule)])


def check_mutants(case):
    pipeline, schedule = case
    full, buckets = with_buckets(pipeline, schedule)
    validate(full, pipeline, **buckets)
    for mutant in mutants(full):
        assert caught(mutant, pipeline, **buckets)


def check_swaps(case, seed, examples):
    """A swap is caught exactly if an independent judge finds that it matters."""
    pipeline, schedule = case
    full = communicate(schedule)
    assert finishes(full, pipeline)
    rng = random.Random(seed)
    for _ in range(examples):
        rank = rng.choice([r for r, actions in enumerate(full) if len(actions) > 1] or [None])
        if rank is None:
            return
        first = rng.randrange(len(full[rank]) - 1)
        second = rng.choice([first + 1, rng.randrange(first + 1, len(full[rank]))])
        mutant = swapped(full, rank, first, second)
        assert caught(mutant, pipeline) == (not finishes(mutant, pipeline)), (rank, first, second)


@settings(max_examples=40, deadline=None)
@given(generated(**SMALL))
def test_dropped_and_doubled_actions_are_caught(case):
    check_mutants(case)


@settings(max_examples=40, deadline=None)
@given(generated(**SMALL), st.integers(0, 2**32))
def test_swapped_actions_are_caught_where_order_matters(case, seed):
    check_swaps(case, seed, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=300, deadline=None)
@given(generated(**SMALL), st.integers(0, 2**32))
def test_mutations_at_length(case, seed):
    check_mutants(case)
    check_swaps(case, seed, 200)


@settings(max_examples=30, deadline=None)
@given(generated(**SMALL))
def test_neighbours_that_build_on_each_other_cannot_be_swapped(case):
    """Every such pair of every rank: what belongs to one microbatch, and what stands in one queue."""
    pipeline, schedule = case
    full = communicate(schedule)
    queued = {Op.SEND_F, Op.SEND_B, Op.RECV_F, Op.RECV_B}
    for rank, actions in enumerate(full):
        for place, (a, b) in enumerate(pairwise(actions)):
            together = (a.stage, a.microbatch) == (b.stage, b.microbatch) and {a.op, b.op} in BUILDS_ON
            same_queue = a.op in queued and (a.stage, a.op) == (b.stage, b.op)
            if together or same_queue:
                assert caught(swapped(full, rank, place, place + 1), pipeline), f"{a} {b}"


@pytest.mark.parametrize(
    ("text", "pipeline", "message"),
    [
        ("0E0,0F0,0B0\n", ONE, r"rank 0, position 0: 0E0 stands before 0F0: swap them"),
        ("0F0,0F0,0E0,0B0\n", ONE, r"rank 0, position 1: 0F0 occurs more than once: it is at position 0 already"),
        ("0F0,0E0,0B0,0F1\n", ONE, r"position 3: 0F1 is beyond the step's 1 microbatches"),
        ("0F0,0B0\n", ONE, r"rank 0: action 0E0 is missing"),
        ("0F0,0E0\n", ONE, r"rank 0: action 0B0 is missing"),
        ("0F0,0E0,0I0\n", ONE, r"rank 0: action 0W0 is missing"),
        ("0F0,0E0,0W0,0I0\n", ONE, r"position 2: 0W0 stands before 0I0"),
        ("0F0,0E0,0B0,0I0,0W0\n", ONE, r"position 2: 0B0 is too much: the microbatch has another backward"),
        ("0E0,0B0\n", ONE, r"action 0F0 is missing"),
        ("\n", ONE, r"action 0F0 is missing"),
        ("0F0,0E0,0B0,1F0\n", ONE, r"1F0 is beyond the last stage that runs, 0"),
        ("0F0\n", TWO, r"the schedule has 1 ranks, the pipeline 2"),
        ("0F0,1F0\n\n", TWO, r"rank 0, position 1: 1F0 belongs to rank 1, which has that stage"),
        ("0F0,0E0,0B0,0F1,0B1\n1F0,1E0,1B0,1F1,1E1,1B1\n", TWO, r"position 1: 0E0 is too much: the stage has no heads"),
        (
            "0F0,0B0,0F1,0B1\n1F0,1E0,1B0\n",
            TWO,
            r"rank 1: action 1F1 is missing: a microbatch goes from stage to stage",
        ),
        ("0F0,0B0,0F1,0D1,0B1\n1F0,1E0,1B0,1F1,1E1,1B1\n", TWO, r"0B1, but 0D1 drops the microbatch there"),
        ("0F0,0D0,0F1,0D1\n1F0,1D0,1F1,1E1,1B1\n", TWO, r"microbatch 0 is dropped on stages \[0, 1\]"),
        ("0F0,0B0,0F1,0B1\n1F0,1E0,1B0,1F1,1D1\n", TWO, r"microbatch 1 is dropped on stages \[1\]: only the first"),
    ],
)
def test_computes_that_are_wrong(text, pipeline, message):
    with pytest.raises(ScheduleError, match=message):
        check(from_text(text), pipeline)


FIRST = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
SECOND = "1RECV_F0,1F0,1RECV_F1,1E0,1B0,1SEND_B0,1F1,1E1,1B1,1SEND_B1\n"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FIRST.replace("0SEND_F1,", ""), SECOND, "rank 0: action 0SEND_F1 is missing"),
        (FIRST, SECOND.replace("1RECV_F1,", ""), "rank 1: action 1RECV_F1 is missing"),
        (FIRST.replace("0B1", "0B1,0SEND_B1"), SECOND, "position 8: 0SEND_B1 is too much: nobody needs"),
        (FIRST, SECOND.replace("1E0,1B0,1SEND_B0", "1SEND_B0,1E0,1B0"), "1SEND_B0 stands before 1B0"),
        (FIRST.replace("0RECV_B0,0B0", "0B0,0RECV_B0"), SECOND, "0B0 stands before 0RECV_B0"),
        (
            FIRST,
            "1RECV_F1,1RECV_F0,1F0,1E0,1B0,1SEND_B0,1F1,1E1,1B1,1SEND_B1\n",
            "rank 1, position 0: 1RECV_F1 is posted, but the next message from rank 0 is that of 1RECV_F0",
        ),
    ],
)
def test_messages_that_are_wrong(first, second, message):
    validate(from_text(FIRST + SECOND), TWO)
    with pytest.raises(ScheduleError, match=message):
        validate(from_text(first + second), TWO)


def test_a_deadlock_is_shown():
    """Each rank sends before it posts what the other's send waits for."""
    first = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
    second = "1RECV_F0,1F0,1E0,1B0,1SEND_B0,1RECV_F1,1F1,1E1,1B1,1SEND_B1\n"
    with pytest.raises(ScheduleError) as error:
        validate(from_text(first + second), TWO)
    assert str(error.value).splitlines() == [
        "deadlock: no rank can go on",
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 <-- HERE, waits for 1RECV_F1; then 0RECV_B0 0B0 0RECV_B1 ...",
        "rank 1: ... 1F0 1E0 1B0 1SEND_B0 <-- HERE, waits for 0RECV_B0; then 1RECV_F1 1F1 1E1 ...",
    ]


def test_ranks_that_are_through_are_shown_so():
    """Microbatch 1 goes to stage 1 only, so that rank 2 is through when the others wait for each other."""
    text = (
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
        "1RECV_F0,1F0,1SEND_F0,1E0,1RECV_B0,1B0,1SEND_B0,1RECV_F1,1F1,1E1,1B1,1SEND_B1\n"
        "2RECV_F0,2F0,2E0,2B0,2SEND_B0\n"
    )
    with pytest.raises(ScheduleError) as error:
        validate(from_text(text), Pipeline(3, 2, frozenset({1, 2})))
    assert str(error.value).splitlines()[2:] == [
        "rank 1: ... 1E0 1RECV_B0 1B0 1SEND_B0 <-- HERE, waits for 0RECV_B0; then 1RECV_F1 1F1 1E1 ...",
        "rank 2: ... 2E0 2B0 2SEND_B0 (done)",
    ]


def test_memory_bound():
    pipeline = Pipeline(4, 8, frozenset({3}))
    schedule = communicate(one_f_one_b(pipeline))
    assert most_in_flight(schedule) == [4, 3, 2, 1]
    validate(schedule, pipeline, max_in_flight=4)
    with pytest.raises(ScheduleError, match="rank 0 holds the activations of 4 microbatches at a time, allowed are 3"):
        validate(schedule, pipeline, max_in_flight=3)
    with pytest.raises(ScheduleError, match="rank 3 holds"):
        validate(schedule, pipeline, max_in_flight=[4, 3, 2, 0])


def test_reductions():
    pipeline = Pipeline(2, 2, frozenset({1}))
    schedule = communicate(add_reductions(one_f_one_b(pipeline), {0: 1}, {1: 1}))
    validate(schedule, pipeline, {0: 1}, {1: 1})
    with pytest.raises(ScheduleError, match="rank 0: action 0R1 is missing"):
        validate(schedule, pipeline, {0: 2}, {1: 1})
    with pytest.raises(ScheduleError, match="1R0 stands before 1B1, which adds to the bucket"):
        validate(schedule, pipeline, {0: 1, 1: 1})
    with pytest.raises(ScheduleError, match="0R0 reduces a bucket that is not there"):
        validate(schedule, pipeline, {}, {1: 1})
