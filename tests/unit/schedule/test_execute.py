"""The executor runs any valid list: all ranks in one process, every gradient held against plain autograd."""

from functools import cache
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.model import ExitConfig
from megatron.exits.spec import FINAL
from megatron.nn.linear import defer_weight_gradients
from megatron.schedule.actions import Flow, Op, Pipeline, Schedule, from_text
from megatron.schedule.check import most_in_flight, validate
from megatron.schedule.communicate import communicate
from megatron.schedule.execute import Plan, Step, run
from megatron.schedule.fill import fill_bubbles
from megatron.schedule.generate import GENERATORS
from megatron.testing.tiny import build_gpt, model_config, random_batch
from tests.unit.schedule.autograd import Span, step_gradients
from tests.unit.schedule.one_process import MemoryLink, Outcome, Queues, StuckError, Turns, run_all_ranks
from tests.unit.schedule.strategies import filled, pipelines, shuffled

VOCAB, LENGTH = 12, 4
HEADS = {
    "tied": {},
    "pre": {"pre_exit": True, "untie_exit_output_weights": True},
    "norm": {"exit_norm": "own", "untie_exit_output_weights": True},
    "final_norm": {"exit_norm": "final"},
    "mlp": {"use_exit_mlp": True, "exit_norm": "own"},
    "block": {"use_exit_block": True},
}


@cache
def toy(num_stages: int, exit_stages: frozenset[int], kind: str):
    """A model of one layer a stage, exits on some, and where it keeps weight gradients for later."""
    config = model_config(hidden_size=8, num_attention_heads=2, seq_length=LENGTH, num_layers=num_stages)
    exits = ExitConfig(exit_layer_nums=tuple(stage + 1 for stage in sorted(exit_stages)), **HEADS[kind])
    model = build_gpt(config, exits, VOCAB, VOCAB, torch.float64, num_stages=num_stages)
    return model, defer_weight_gradients(model)


def exit_weights(model) -> dict[str, float]:
    return {label: 1.0 if label == FINAL else 0.1 + 0.2 * int(label) for label in model.head_labels()}


def spans_of(schedule: Schedule) -> list[Span]:
    """First and last stage on which each microbatch goes backward."""
    ways = [[s for s, other in Flow.of(schedule).backwards if other == m] for m in range(schedule.num_microbatches)]
    return [Span(min(way), max(way)) for way in ways]


def execute(pipeline: Pipeline, schedule: Schedule, exit_stages, kind="tied", seed=0, blocking=False) -> Outcome:
    """Run `schedule`, given without messages, and compare all gradients and losses with autograd's."""
    full = communicate(schedule)
    validate(full, pipeline)
    model, later = toy(pipeline.num_stages, frozenset(exit_stages), kind)
    batches = [random_batch(1, LENGTH, VOCAB, seed=m, eod_mask_loss=False) for m in range(pipeline.num_microbatches)]
    weights = exit_weights(model)
    plan = Plan.of(full)
    outcome = run_all_ranks(plan, model, batches, weights, later, seed, blocking)
    gradients, losses = step_gradients(model, model.stages, batches, spans_of(schedule), weights)
    assert gradients.keys() == outcome.gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(outcome.gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    ran = {(a.stage, a.microbatch) for rank in schedule for a in rank if a.op is Op.HEADS}
    assert outcome.terms.keys() == ran
    for label, loss in losses.items():
        mine = [terms.loss[label] for terms in outcome.terms.values() if label in terms.loss]
        assert float(sum(mine) / len(mine)) == pytest.approx(loss, rel=1e-12)
    for alive, most in zip(outcome.alive, most_in_flight(schedule), strict=True):
        assert alive.left == 0
        assert alive.most <= most
    return outcome


@st.composite
def random_cases(draw):
    """A pipeline, a random valid schedule for it, the stages with exits, and the kind of its heads."""
    chunks = draw(st.integers(1, 3))
    pipeline = draw(pipelines(most_ranks=max(2, 5 - chunks), most_microbatches=6, chunks=chunks))
    schedule = shuffled(pipeline, draw(st.integers(0, 2**32)), partial=draw(st.booleans()))
    last = pipeline.num_stages - 1
    exit_stages = pipeline.heads if draw(st.booleans()) else pipeline.heads - {last}
    return pipeline, schedule, exit_stages, draw(st.sampled_from(sorted(HEADS)))


@settings(max_examples=25, deadline=None)
@given(random_cases(), st.integers(0, 2**32), st.booleans())
def test_any_valid_schedule_gives_the_gradients_of_autograd(case, seed, blocking):
    execute(*case, seed, blocking)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=300, deadline=None)
@given(random_cases(), st.integers(0, 2**32), st.booleans())
def test_any_valid_schedule_at_length(case, seed, blocking):
    execute(*case, seed, blocking)


@settings(max_examples=10, deadline=None)
@given(filled(most_ranks=5, most_microbatches=10), st.integers(0, 2**32))
def test_filled_schedules_give_the_gradients_of_autograd(case, seed):
    pipeline, schedule = case
    execute(pipeline, schedule, pipeline.heads, seed=seed)


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_generated_schedules_hold_no_more_than_they_say(kind):
    """Exactly as many microbatches as counted on paper; ZB-H1 hands activations to W as closures."""
    pipeline = Pipeline(3, 7, frozenset(range(6 if kind == "interleaved" else 3)), 2 if kind == "interleaved" else 1)
    schedule = GENERATORS[kind](pipeline)
    outcome = execute(pipeline, schedule, pipeline.heads)
    if kind != "zb-h1":
        assert [alive.most for alive in outcome.alive] == most_in_flight(schedule)


def test_tuning_keeps_nothing():
    """Heads alone learn: no backward, and activations go as soon as nobody needs them, exits or not."""
    pipeline = Pipeline(3, 5, frozenset({0, 2}), tuning=True)
    plan = Plan.of(communicate(GENERATORS["1f1b"](pipeline)))
    model, later = toy(3, frozenset({0, 2}), "norm")
    batches = [random_batch(1, LENGTH, VOCAB, seed=m) for m in range(5)]
    outcome = run_all_ranks(plan, model, batches, exit_weights(model), later)
    assert [alive.most for alive in outcome.alive] == [1, 1, 1]
    assert [alive.left for alive in outcome.alive] == [0, 0, 0]


def test_sends_that_block_are_noticed_where_ranks_wait_for_each_other():
    """The tests' own link: each rank sends before it posts what the other's send waits for."""
    first = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
    second = "1RECV_F0,1F0,1E0,1B0,1SEND_B0,1RECV_F1,1F1,1E1,1B1,1SEND_B1\n"
    plan = Plan.of(from_text(first + second))
    model, later = toy(2, frozenset(), "tied")
    batches = [random_batch(1, LENGTH, VOCAB, seed=m) for m in range(2)]
    run_all_ranks(plan, model, batches, exit_weights(model), later)
    with pytest.raises(StuckError):
        run_all_ranks(plan, model, batches, exit_weights(model), later, blocking=True)


def test_what_was_not_waited_for_is_not_there():
    """The tests' own link again: a receive holds no number before `wait`."""
    turns = Turns()
    queues, into = Queues(turns), torch.zeros(2)

    def first() -> None:
        MemoryLink(queues, 0).send(torch.ones(2), 1, 0)

    def second() -> tuple[bool, float]:
        work = MemoryLink(queues, 1).receive(into, 0, 0)
        empty = bool(into.isnan().all())
        work.wait()
        return empty, float(into.sum())

    assert turns.run([first, second]) == [None, (True, 2.0)]


def test_reductions_are_called_in_their_place():
    """R goes to the step's `reduce` with stage and bucket, in the order of the list."""
    called = []
    plan = Plan.of(from_text("0F0,0E0,0B0,0R1,0F1,0E1,0B1,0R0\n"))
    step = Step(
        {0: _Silent(called)}, [None] * 2, [None] * 2, None, lambda stage, m: None, lambda s, b: called.append((s, b))
    )
    run(plan, 0, step)
    assert called == ["F", "E", "B", (0, 1), "F", "E", "B", (0, 0)]


class _Silent:
    """A stage that only notes its calls."""

    def __init__(self, called: list) -> None:
        self.called = called

    def forward(self, batch, stream, received=None):
        self.called.append("F")
        return type("Activations", (), {"take_hidden": lambda self: None})()

    def backward_heads(self, activations, batch, objective, share):
        self.called.append("E")
        return None, []

    def backward(self, activations, gradients, received=None):
        self.called.append("B")


def runs_of(pipeline, schedule, orders, normalization="unbiased"):
    """Filled gradients for each order of the data, their mean, and the full batch's."""
    model, later = toy(pipeline.num_stages, pipeline.heads, "tied")
    data = [random_batch(1, LENGTH, VOCAB, seed=m, eod_mask_loss=False) for m in range(pipeline.num_microbatches)]
    weights = exit_weights(model)
    plan = Plan.of(communicate(schedule), normalization)
    runs = [run_all_ranks(plan, model, [data[i] for i in order], weights, later).gradients for order in orders]
    full, _ = step_gradients(model, model.stages, data, [Span(0, pipeline.num_stages - 1)] * len(data), weights)
    return runs, {name: sum(one[name] for one in runs) / len(runs) for name in full}, full


def rotations(count: int) -> list[list[int]]:
    """A gradient is a sum over positions of what the datum there brings, and over the rotations, as over all
    permutations, each datum is equally often at each position: the mean over either is the same."""
    return [[*range(i, count), *range(i)] for i in range(count)]


def check_mean(pipeline, fillers, orders):
    """Over all choices of which data are partial, the mean is the full gradient; one choice alone is not."""
    runs, mean, full = runs_of(pipeline, fill_bubbles(pipeline, *fillers), orders)
    for name, gradient in full.items():
        torch.testing.assert_close(mean[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    assert max(float((one[name] - full[name]).abs().max()) for one in runs for name in full) > 1e-3


@pytest.mark.parametrize(
    ("heads", "fillers"),
    [({0, 1, 2, 3}, (2, 2)), ({0, 1, 2, 3}, (2, 0)), ({0, 3}, (0, 2)), ({1, 3}, (2, 1)), ({0, 2, 3}, (1, 2))],
)
def test_the_mean_over_who_is_partial_is_the_full_gradient(heads, fillers):
    check_mean(Pipeline(4, 8, frozenset(heads)), fillers, rotations(8))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("heads", [{0, 1, 2}, {0, 2}, {1, 2}])
def test_the_mean_over_all_permutations_is_the_full_gradient(heads):
    check_mean(Pipeline(3, 5, frozenset(heads)), (1, 1), list(permutations(range(5))))


def test_one_divisor_for_all_is_biased():
    """EE-LLM's own normalization: why it is not the default."""
    pipeline = Pipeline(4, 8, frozenset(range(4)))
    _, mean, full = runs_of(pipeline, fill_bubbles(pipeline, 2, 2), rotations(8), "original")
    assert max(float((mean[name] - full[name]).abs().max()) for name in full) > 1e-3
