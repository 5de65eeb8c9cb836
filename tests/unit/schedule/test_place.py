import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.schedule.actions import Action, Op, Pipeline, ScheduleError
from megatron.schedule.check import check, validate
from megatron.schedule.communicate import communicate
from megatron.schedule.generate import gpipe, one_f_one_b
from megatron.schedule.place import best_fill, place_heads
from megatron.schedule.simulate import Costs, simulate
from tests.unit.schedule.strategies import generated, pipelines, stage_costs


def is_never_longer(data, case):
    pipeline, schedule = case
    costs = data.draw(stage_costs(schedule.num_stages))
    max_ahead = data.draw(st.sampled_from([None, 1, 2, 5]))
    placed = place_heads(schedule, costs, max_ahead)
    assert simulate(placed, costs).makespan <= simulate(schedule, costs).makespan
    check(placed, pipeline)
    full = communicate(schedule)
    moved = place_heads(full, costs, max_ahead)
    assert simulate(moved, costs).makespan <= simulate(full, costs).makespan
    validate(moved, pipeline)


def fills_for_nothing(data, pipeline):
    costs = data.draw(stage_costs(pipeline.num_stages))
    planned = data.draw(st.booleans())
    filling = best_fill(pipeline, costs, planned_heads=planned)
    assert filling.timeline.makespan <= filling.plain.makespan * (1 + 1e-9)
    check(filling.schedule, pipeline)
    assert filling.plain.bubble_share >= 0


@settings(max_examples=40, deadline=None)
@given(st.data(), generated(most_ranks=8, most_microbatches=24))
def test_heads_in_idle_time_never_lengthen_the_step(data, case):
    is_never_longer(data, case)


@settings(max_examples=30, deadline=None)
@given(st.data(), pipelines(most_ranks=8, most_microbatches=24))
def test_chosen_fillers_never_lengthen_the_step(data, pipeline):
    fills_for_nothing(data, pipeline)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=1000, deadline=None)
@given(st.data(), generated())
def test_heads_in_idle_time_never_lengthen_the_step_at_length(data, case):
    is_never_longer(data, case)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=1000, deadline=None)
@given(st.data(), pipelines())
def test_chosen_fillers_never_lengthen_the_step_at_length(data, pipeline):
    fills_for_nothing(data, pipeline)


@pytest.mark.parametrize("p", [2, 4, 8, 16])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_heads_in_idle_time_shorten_the_step_where_early_and_middle_stages_wait(p, share):
    """Not on the last stage, which never waits for a gradient; elsewhere by one head for each other one in flight."""
    for stage in {0, p // 4, p // 2 - 1, p - 2}:
        costs = [Costs(heads=share if s == stage else 0.0) for s in range(p)]
        schedule = one_f_one_b(Pipeline(p, 4 * p, frozenset({stage, p - 1})))
        saved = simulate(schedule, costs).makespan - simulate(place_heads(schedule, costs), costs).makespan
        assert saved == pytest.approx(share * (p - 1 - stage))
    last = [Costs(heads=share if s == p - 1 else 0.0) for s in range(p)]
    schedule = one_f_one_b(Pipeline(p, 4 * p, frozenset({p - 1})))
    assert simulate(place_heads(schedule, last), last) == simulate(schedule, last)


def test_heads_run_ahead_no_further_than_asked():
    pipeline = Pipeline(4, 12, frozenset({0, 3}))
    costs = [Costs(heads=0.5)] + [Costs()] * 3
    steps = []
    for most in (1, 2, 3, None):
        placed = place_heads(one_f_one_b(pipeline), costs, most)
        ahead = peak = 0
        for action in placed[0]:
            ahead += {Op.HEADS: 1, Op.BACKWARD: -1}.get(action.op, 0)
            peak = max(peak, ahead)
        assert most is None or peak == most
        steps.append(simulate(placed, costs).makespan)
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[2]
    assert place_heads(one_f_one_b(pipeline), costs, 1) == one_f_one_b(pipeline)


def test_heads_are_placed_in_gpipe():
    pipeline, costs = Pipeline(2, 4, frozenset({0, 1})), [Costs(heads=0.25), Costs()]
    placed = place_heads(gpipe(pipeline), costs)[0]
    assert [a for a in placed if a.op in (Op.HEADS, Op.BACKWARD)][:4] == [
        Action(0, Op.HEADS, m) for m in range(4)
    ]  # all in the wait for the first gradient


@pytest.mark.parametrize(("p", "m", "fillers"), [(3, 6, 1), (4, 8, 2), (8, 16, 4), (16, 48, 10)])
def test_equal_stages_without_head_costs_take_all_fillers_for_nothing(p, m, fillers):
    filling = best_fill(Pipeline(p, m, frozenset(range(p))), [Costs()] * p)
    assert (filling.warmup, filling.cooldown) == (fillers, fillers)
    assert filling.timeline.makespan == filling.plain.makespan
    assert filling.timeline.bubble_share < filling.plain.bubble_share


def test_none_where_none_fits():
    p = 4
    for pipeline in (
        Pipeline(1, 8, frozenset({0})),
        Pipeline(p, 3, frozenset(range(p))),
        Pipeline(2, 9, frozenset({1})),
    ):
        filling = best_fill(pipeline, [Costs()] * p)
        assert (filling.warmup, filling.cooldown) == (0, 0)
        assert filling.schedule == one_f_one_b(pipeline)
    costly = best_fill(Pipeline(p, 8, frozenset(range(p))), [Costs(heads=5.0)] * p)
    assert (costly.warmup, costly.cooldown) == (0, 0)
    loose = best_fill(Pipeline(p, 8, frozenset(range(p))), [Costs(heads=0.1)] * p, ratio=2.0, slack=0.2)
    assert (loose.warmup, loose.cooldown) == (2, 2)


def test_the_ratio_comes_from_the_costs():
    slow_backward = [Costs(input=1.5, weight=1.5)] * 4
    assert best_fill(Pipeline(4, 16, frozenset(range(4))), slow_backward).warmup == 2
    nothing = [Costs(0.0, 0.0, 0.0, 0.0)] * 4
    assert best_fill(Pipeline(4, 16, frozenset(range(4))), nothing).warmup == 2
    with pytest.raises(ScheduleError, match="one chunk"):
        best_fill(Pipeline(2, 16, frozenset({3}), 2), [Costs()] * 4)
