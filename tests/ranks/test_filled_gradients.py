"""Bubble filling on real ranks: every gradient is the sum of exactly the terms that the formula names.

The reference is one process and plain autograd over the whole model. Which microbatch goes backward on which stages
follows from the counts f_k and b_k alone (EE-LLM, arXiv 2312.04916, appendix), written here once more.
"""

import pytest
import torch

from megatron.config.run import RunConfig
from megatron.exits.spec import FINAL, exit_specs
from megatron.model.names import named_parts
from megatron.model.partition import partition, stages_of
from megatron.parallel.mesh import ONE_RANK
from megatron.planning.costs import stage_costs
from megatron.schedule.actions import Pipeline
from megatron.schedule.place import best_fill
from megatron.testing.layouts import VOCAB, Whole, assemble, build, one_step, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import random_batch
from tests.unit.schedule.autograd import Span, step_gradients

RATIO = 2.0  # of a backward's time to a forward's


def spans(p: int, m: int, exits: set[int], warmup: int, cooldown: int) -> list[Span]:
    """On which stages each of a step's microbatches goes backward; exits: the stages with any."""
    most = int((p - 1) * RATIO / (1 + RATIO))
    warmup, cooldown = min(warmup, most), min(cooldown, most)
    f = [max(0, min(warmup, int((RATIO * (p - 1 - k) - k) / (1 + RATIO)))) for k in range(p)]
    b = [min(cooldown, int(RATIO * k / (1 + RATIO))) for k in range(p)]
    found = [Span(0, p - 1)] * m
    for i in range(warmup):
        reached = [k for k in range(p - 1) if i < f[k] and k in exits]
        if reached:
            found[p + i] = Span(0, reached[-1])
    for q in range(cooldown):
        found[m - cooldown + q] = Span(min(k for k in range(p) if b[k] > q), p - 1)
    return found


def expected(config: RunConfig, way: list[Span], pp: int, dp: int) -> tuple[Whole, dict[str, float]]:
    """Gradients of the whole model by the formula, and mean losses by head; means over data-parallel ranks."""
    torch.set_default_dtype(torch.float64)  # initial values are drawn in it
    trainer = build(ONE_RANK, config, torch.float64)
    torch.set_default_dtype(torch.float32)
    stages = partition((config.model.num_layers // pp,) * pp, exit_specs(config.exits))
    weights = {spec.label: spec.weight for spec in exit_specs(config.exits)} | {FINAL: 1.0}
    original = config.parallel.fill_loss_normalization == "original"
    whole: Whole = {}
    losses: dict[str, float] = {}
    for rank in range(dp):
        batches = [random_batch(1, 16, VOCAB, seed=i * dp + rank, eod_mask_loss=False) for i in range(len(way))]
        gradients, means = step_gradients(trainer.model, stages, batches, way, weights, original)
        for name, gradient in gradients.items():
            for part, placed in named_parts(name, gradient, trainer.model, trainer.vocab_size):
                whole[part] = whole.get(part, 0) + placed.view / dp
        losses = {label: losses.get(label, 0.0) + mean / dp for label, mean in means.items()}
    return whole, losses


GPT = "--init-method-std 0.3"
LLAMA = (
    "--normalization RMSNorm --position-embedding-type rope --swiglu --ffn-hidden-size 48 --disable-bias-linear "
    "--untie-embeddings-and-output-weights --untie-exit-output-weights"
)


def compare(ranks: Ranks, flags: str, exit_layers: list[int], layout: dict[str, int], fillers: tuple[int, int]) -> None:
    """One layer a stage unless `flags` say otherwise; fillers: of the warm-up and the cool-down."""
    pp, dp = layout["pp"], layout.get("dp", 1)
    numbers = [str(layer) for layer in exit_layers]
    weights = [str(0.2 + 0.1 * layer) for layer in exit_layers]
    config = toy_config(
        *("--num-layers", str(pp), "--pipeline-model-parallel-size", str(pp), "--fill-explicit-bubbles"),
        *("--num-fill-warmup-microbatches", str(fillers[0]), "--num-fill-cooldown-microbatches", str(fillers[1])),
        *("--exit-layer-nums", *numbers, "--exit-layer-weight", *weights),
        *flags.split(),
    )
    stages = partition((config.model.num_layers // pp,) * pp, exit_specs(config.exits))
    way = spans(pp, 8 // dp, {stage.index for stage in stages if stage.exits}, *fillers)
    check(ranks, config, layout, way)


def check(ranks: Ranks, config: RunConfig, layout: dict[str, int], way: list[Span]) -> None:
    pp, dp = layout["pp"], layout.get("dp", 1)
    assert set(way) != {Span(0, pp - 1)}  # some are partial
    gradients, losses = expected(config, way, pp, dp)
    answers = ranks.run(one_step, config, torch.float64, **layout)
    found = assemble(answers)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    for answer in answers:
        assert answer["losses"] == pytest.approx(losses, rel=1e-10)


SUBSETS = [[1, 2, 3, 4], [1], [2], [1, 3], [1, 4], [3], [4]]  # exits by layer, which is a stage each; 2, 3: a gap


def cases(quick: set[int]) -> list:
    """Exits on all, some and single stages, with several numbers of fillers."""
    found = []
    for exit_layers in SUBSETS:
        for fillers in ((2, 2), (2, 0), (0, 2), (1, 1)):
            if fillers[1] or min(exit_layers) <= 2:  # else no filler meets an exit on its way
                marks = () if len(found) in quick else pytest.mark.slow
                found.append(pytest.param(exit_layers, fillers, marks=marks))
    return found


@pytest.mark.parametrize(("exit_layers", "fillers"), cases({0, 5, 12, 18}))
def test_four_stages(ranks: Ranks, exit_layers: list[int], fillers: tuple[int, int]) -> None:
    compare(ranks, GPT, exit_layers, {"pp": 4}, fillers)


@pytest.mark.parametrize("exit_layers", [[1, 2, 3], [1], pytest.param([2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("fillers", [(1, 1), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_three_stages(ranks: Ranks, exit_layers: list[int], fillers: tuple[int, int]) -> None:
    compare(ranks, LLAMA, exit_layers, {"pp": 3}, fillers)


HEADS = {
    "final_norm": "--exit-norm final",
    "mlp": "--use-exit-mlp --use-exit-norm",
    "block": "--use-exit-block --untie-exit-output-weights",
    "pre": "--pre-exit",
    "original": "--fill-loss-normalization original",
}


@pytest.mark.parametrize(
    "heads",
    ["original", "final_norm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "block", "pre"))],
)
def test_heads_and_normalization(ranks: Ranks, heads: str) -> None:
    compare(ranks, f"{GPT} {HEADS[heads]}", [1, 3, 4], {"pp": 4}, (2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--sequence-parallel", "--fill-loss-normalization original"])
@pytest.mark.parametrize(
    ("layout", "fillers"),
    [
        ({"tp": 2, "pp": 3}, (1, 1)),
        ({"tp": 2, "pp": 4}, (2, 2)),
        ({"pp": 3, "dp": 2}, (1, 0)),
        ({"pp": 3, "dp": 2}, (0, 1)),
    ],
)
@pytest.mark.parametrize("exit_layers", [[1, 2, 3], [1], [1, 3]])
def test_with_other_axes(ranks: Ranks, exit_layers: list[int], layout: dict, fillers: tuple, more: str) -> None:
    if more == "--sequence-parallel" and "tp" not in layout:
        more = "--use-distributed-optimizer"
    compare(ranks, f"{GPT} {more}", exit_layers, layout, fillers)


def test_as_many_as_cost_nothing_by_default(ranks: Ranks) -> None:
    """Without counts: what simulation with the model's costs finds, here some of both kinds."""
    flags = (
        "--num-layers 8 --pipeline-model-parallel-size 4 --fill-explicit-bubbles --exit-layer-nums 2 3 4 7 "
        "--exit-layer-weight 0.1 0.2 0.3 0.4 --init-method-std 0.3"
    )
    config = toy_config(*flags.split())
    stages = stages_of(config.model, config.exits, config.parallel)
    costs = stage_costs(config.model, config.exits, stages, 64, 16)
    chosen = best_fill(Pipeline(4, 8, frozenset((0, 1, 3))), costs, 2.0)
    assert chosen.warmup > 0
    check(ranks, config, {"pp": 4}, spans(4, 8, {0, 1, 3}, chosen.warmup, chosen.cooldown))


def test_the_spans_of_the_papers_example() -> None:
    """P = 4, r = 2: f = 2, 1, 0, 0 and b = 0, 0, 1, 2."""
    whole = Span(0, 3)
    partial = [Span(0, 1), Span(0, 0), Span(2, 3), Span(3, 3)]
    assert spans(4, 8, {0, 1, 2}, 2, 2) == [whole] * 4 + partial
    assert spans(4, 8, {0}, 2, 2) == [whole] * 4 + [Span(0, 0), Span(0, 0), Span(2, 3), Span(3, 3)]
    assert spans(4, 8, {1}, 2, 0) == [whole] * 4 + [Span(0, 1)] + [whole] * 3
