"""The factors of losses, and that they make every gradient an unbiased mean: shown by enumeration on a toy model.

The toy: stage k multiplies by a number w_k; an exit on it has the loss v_k (x - y)^2 / 2 of its output x, the last
stage the final one beside it. Gradients by hand, actions by a dozen lines.
"""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.schedule.actions import Action, Flow, Op, Pipeline, Schedule, ScheduleError, from_text
from megatron.schedule.fill import fill_bubbles
from megatron.schedule.generate import GENERATORS, one_f_one_b
from megatron.schedule.terms import derive_terms
from tests.unit.schedule.strategies import filled, generated

WEIGHTS = [1.3, 0.7, 1.1, 0.9, 1.2, 0.8]
EXIT_WEIGHTS = [0.25, 0.5, 0.3, 0.2, 0.15, 0.1]


class Toy:
    """Runs a schedule's computes, rank after rank as their results come, and sums the gradients of w."""

    def __init__(self, schedule, exits, normalization="unbiased"):
        self.schedule, self.exits = schedule, exits
        self.terms, self.flow = derive_terms(schedule, normalization), Flow.of(schedule)
        self.last = schedule.num_stages - 1

    def gradients(self, data):
        """data: per microbatch an input and a target."""
        self.data, self.x, self.taps, self.down = data, {}, {}, {}
        self.sums = [0.0] * (self.last + 1)
        waiting = [list(rank) for rank in self.schedule]
        while any(waiting):
            for rank in waiting:
                while rank and self.ready(rank[0]):
                    self.do(*rank.pop(0))
        return self.sums

    def ready(self, action):
        stage, op, m = action
        if op is Op.FORWARD:
            return stage == 0 or (stage - 1, m) in self.x
        return op is Op.HEADS or self.flow.needs(action) is None or (stage + 1, m) in self.down

    def do(self, stage, op, m):
        if op is Op.FORWARD:
            self.x[stage, m] = WEIGHTS[stage] * (self.x[stage - 1, m] if stage else self.data[m][0])
        elif op is Op.HEADS:
            error = self.x[stage, m] - self.data[m][1]
            exit_part = EXIT_WEIGHTS[stage] * self.terms.exit_factor(stage, m) if stage in self.exits else 0.0
            final_part = self.terms.final_factor if stage == self.last else 0.0
            self.taps[stage, m] = (exit_part + final_part) * error
        elif op is Op.BACKWARD:
            g = self.taps.get((stage, m), 0.0)
            if self.flow.needs(Action(stage, op, m)):
                g += self.terms.gradient_factor(stage, m) * self.down[stage + 1, m]
            self.sums[stage] += g * (self.x[stage - 1, m] if stage else self.data[m][0])
            self.down[stage, m] = g * WEIGHTS[stage]


def full_batch(stages, exits, data):
    """The gradients of the mean over all of `data`, by plain 1F1B with nothing partial."""
    pipeline = Pipeline(stages, len(data), frozenset(exits) | {stages - 1})
    return Toy(one_f_one_b(pipeline), exits).gradients(data)


def toy_data(count):
    return [(0.3 + 0.41 * i * i % 1.7, 0.2 * i - 0.5) for i in range(count)]


@pytest.mark.parametrize("exits", [{0, 1, 2}, {0}, {1, 2}, set()])
@pytest.mark.parametrize("fillers", [(1, 1), (1, 0), (0, 1)])
def test_the_mean_over_all_choices_of_fillers_is_the_full_gradient(exits, fillers):
    """p = 3, 5 microbatches: all 120 ways to hand the data to the schedule's microbatches."""
    data = toy_data(5)
    toy = Toy(fill_bubbles(Pipeline(3, 5, frozenset(exits) | {2}), *fillers), exits)
    runs = [toy.gradients(order) for order in permutations(data)]
    mean = [sum(column) / len(runs) for column in zip(*runs, strict=True)]
    assert mean == pytest.approx(full_batch(3, exits, data), rel=1e-12)
    partial = fillers[1] or 0 in exits  # without an exit within a filler's reach nothing is
    assert (max(abs(a - b) for a, b in zip(runs[0], runs[-1], strict=True)) > 1e-6) == bool(partial)


def check_rotations(case):
    """A gradient is a sum over microbatches, so the choices' mean is that of the data's rotations."""
    pipeline, schedule = case
    exits, data = pipeline.heads, toy_data(pipeline.num_microbatches)
    toy = Toy(schedule, exits)
    runs = [toy.gradients(data[i:] + data[:i]) for i in range(len(data))]
    mean = [sum(column) / len(runs) for column in zip(*runs, strict=True)]
    assert mean == pytest.approx(full_batch(pipeline.num_ranks, exits, data), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(filled(most_ranks=6, most_microbatches=16))
def test_unbiased_for_any_fillers(case):
    check_rotations(case)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(filled(most_ranks=6, most_microbatches=16))
def test_unbiased_for_any_fillers_at_length(case):
    check_rotations(case)


@settings(max_examples=30, deadline=None)
@given(filled())
def test_each_loss_weighs_one_in_sum(case):
    """At every stage, over all microbatches that bring it there, for every loss at or above the stage."""
    pipeline, schedule = case
    terms, last = derive_terms(schedule), pipeline.num_stages - 1
    dropped = {(a.stage, a.microbatch) for rank in schedule for a in rank if a.op is Op.DROP}
    kept = Flow.of(schedule).forwards - dropped
    for loss in pipeline.heads:
        reach = {m: terms.exit_factor(loss, m) for m in range(pipeline.num_microbatches) if (loss, m) in kept}
        final = {m: terms.final_factor for m in reach}
        for stage in range(loss, -1, -1):
            if stage < loss:
                reach = {m: w * terms.gradient_factor(stage, m) for m, w in reach.items() if (stage, m) in kept}
                final = {m: w * terms.gradient_factor(stage, m) for m, w in final.items() if (stage, m) in kept}
            assert sum(reach.values()) == pytest.approx(1.0, rel=1e-12)
            assert loss != last or sum(final.values()) == pytest.approx(1.0, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(generated(kinds=sorted(GENERATORS)), st.sampled_from(["unbiased", "original"]))
def test_without_fillers_everything_weighs_alike(case, normalization):
    pipeline, schedule = case
    terms, m = derive_terms(schedule, normalization), pipeline.num_microbatches
    assert terms.final_factor == 1 / m
    for stage in range(pipeline.active_stages):
        assert terms.exit_factor(stage, 0) == 1 / m
        assert terms.heads_run(stage) == m
        assert stage == pipeline.active_stages - 1 or terms.gradient_factor(stage, 0) == 1.0


def test_the_factors_of_the_papers_example():
    """P = 4, M = 8, F = 2 + 2: N = 4, 4, 5, 6; f = 2, 1, 0, 0; c = 1/4."""
    schedule = fill_bubbles(Pipeline(4, 8, frozenset(range(4))), 2, 2)
    terms = derive_terms(schedule)
    assert terms.complete == (4, 4, 5, 6)
    assert terms.fillers == (2, 1, 0, 0)
    assert terms.warmup == {4, 5}
    assert [terms.heads_run(stage) for stage in range(4)] == [6, 5, 5, 6]
    assert terms.exit_factor(0, 0) == terms.exit_factor(0, 4) == pytest.approx(1 / 4 / 1.5)
    assert terms.exit_factor(2, 6) == pytest.approx(1 / 5)
    assert terms.final_factor == pytest.approx(1 / 6)
    assert [terms.gradient_factor(stage, 0) for stage in range(3)] == [1.0, 5 / 4, 6 / 5]
    assert terms.gradient_factor(0, 4) == 1.0
    original = derive_terms(schedule, "original")
    assert {original.exit_factor(k, m) for k in range(4) for m in range(8)} == {original.final_factor} == {1 / 6}
    assert original.gradient_factor(1, 0) == 1.0


def test_terms_of_a_schedule_by_hand():
    schedule = from_text("0F0,0F1,0E1,0B1,0E0,0B0,0F2,0D2\n1F0,1E0,1B0,1F2,1E2,1B2\n")
    terms = derive_terms(schedule)
    assert (terms.complete, terms.fillers, terms.warmup) == ((1, 2), (1, 0), {1})


def test_a_step_needs_a_complete_microbatch():
    with pytest.raises(ScheduleError, match="no microbatch goes through all stages and back"):
        derive_terms(from_text("0F0,0D0\n1F0,1E0,1B0\n"))
    with pytest.raises(ScheduleError, match="no microbatch"):
        derive_terms(Schedule(((),)))
