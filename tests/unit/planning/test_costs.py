"""Costs of stages against sums written out by hand."""

from dataclasses import replace

import pytest

from megatron.config.model import ExitConfig
from megatron.config.training import TrainingConfig
from megatron.exits.spec import exit_specs
from megatron.model.partition import partition
from megatron.planning.costs import Clock, stage_costs
from megatron.planning.device import Device
from megatron.planning.flops import attention_flops, head_flops, layer_flops, mlp_flops, training_flops_per_token
from megatron.testing.tiny import model_config

MODEL = model_config("llama", num_layers=6)
VOCAB, TOKENS = 64, 32
LAYER = TOKENS * layer_flops(MODEL, MODEL.seq_length)
CORE = TOKENS * attention_flops(MODEL, MODEL.seq_length)
HEAD = TOKENS * head_flops(MODEL, VOCAB)
DEVICE = Device("toy", 1e9, 1e9, 1e9, within=1e6, between=1e5, per_node=2)


def costs(depths=(2, 4), numbers=(), device=None, exits=None, **changes):
    exits = replace(exits or ExitConfig(), exit_layer_nums=numbers)
    stages = partition(depths, exit_specs(exits))
    return stage_costs(MODEL, exits, stages, VOCAB, TOKENS, device, **changes)


def test_times_are_flops_without_a_device() -> None:
    first, last = costs(numbers=(1, 2))
    assert (first.forward, first.input + first.weight, first.heads) == (2 * LAYER, 2 * 2 * LAYER, 2 * 3 * HEAD)
    assert (last.forward, last.input + last.weight, last.heads) == (4 * LAYER, 2 * 4 * LAYER, 3 * HEAD)
    assert first.input - first.weight == pytest.approx(2 * 2 * CORE), (
        "scores have no weights: their backward is input's"
    )


def test_all_stages_together_are_the_model_s_work() -> None:
    exits = ExitConfig(use_exit_mlp=True, use_exit_block=True)
    found = costs(depths=(1, 2, 3), numbers=(2, 6), exits=exits)
    total = sum(cost.forward + cost.heads + cost.input + cost.weight for cost in found)
    numbered = replace(exits, exit_layer_nums=(2, 6))
    assert total == pytest.approx(TOKENS * training_flops_per_token(MODEL, numbered, VOCAB))


def test_an_exit_s_parts_count() -> None:
    plain, branch, block = (
        costs(numbers=(1,), exits=exits)[0].heads
        for exits in (ExitConfig(), ExitConfig(use_exit_mlp=True), ExitConfig(use_exit_block=True))
    )
    assert branch - plain == pytest.approx(3 * TOKENS * mlp_flops(MODEL))
    assert block - plain == pytest.approx(3 * LAYER)


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ({"recompute_granularity": "selective"}, (2 * CORE, 4 * CORE)),
        ({"recompute_granularity": "full", "recompute_method": "uniform"}, (2 * LAYER, 4 * LAYER)),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
            (2 * LAYER, 3 * LAYER),
        ),
    ],
)
def test_recompute_makes_the_backward_longer(flags, again) -> None:
    longer = [
        changed.input - plain.input
        for changed, plain in zip(costs(training=TrainingConfig(**flags)), costs(), strict=True)
    ]
    assert longer == pytest.approx(again)


def test_a_device_makes_seconds_and_messages() -> None:
    alone, timed = costs()[1], costs(device=DEVICE)[1]
    assert timed.forward == pytest.approx(alone.forward / 1e9)
    message = TOKENS * MODEL.hidden_size * 2
    assert timed.message == pytest.approx(message / 1e6), "the next stage is in the same node"
    assert costs(device=DEVICE, dp=2)[1].message == pytest.approx(message / 1e5), "and with two replicas in another"


def test_measured_times_replace_computed_ones() -> None:
    measured = replace(DEVICE, actions={"layer_forward": 1.0, "layer_backward": 3.0, "head": 0.5})
    first, last = costs(device=measured, numbers=(1,))
    assert (first.forward, first.input + first.weight) == pytest.approx((2 * TOKENS, 6 * TOKENS))
    assert (first.heads, last.heads) == pytest.approx((0.5 * TOKENS, 0.5 * TOKENS))
    assert Clock(MODEL, VOCAB, TOKENS, measured, tp=2).layer().forward > TOKENS / 2


def test_tensor_parallel_ranks_share_work_and_exchange_hidden_states() -> None:
    """Two regions a layer; a ring's all-reduce sends 2 (n - 1)/n of a hidden state."""
    hidden = TOKENS * MODEL.hidden_size * 2
    reduce = 2 * hidden * (2 - 1) / 2 / 1e6
    one = Clock(MODEL, VOCAB, TOKENS, DEVICE).layer()
    two = Clock(MODEL, VOCAB, TOKENS, DEVICE, tp=2).layer()
    cut = Clock(MODEL, VOCAB, TOKENS, DEVICE, tp=2, sequence_parallel=True).layer()
    assert two.forward == pytest.approx(one.forward / 2 + 2 * reduce)
    assert cut.forward == pytest.approx(two.forward), "a gather and a reduce-scatter are an all-reduce"
    assert cut.total - two.total == pytest.approx(4 * reduce / 2), "gathers of the backward pass, twice a region"
    four = Clock(MODEL, VOCAB, TOKENS, DEVICE, tp=4).layer()
    assert four.forward == pytest.approx(one.forward / 4 + 2 * 2 * hidden * 3 / 4 / 1e5), "beyond the node it is slow"
