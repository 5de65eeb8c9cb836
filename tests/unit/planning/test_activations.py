"""What is counted as kept, against the tensors that autograd saves."""

from itertools import product

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron.config.model import ExitConfig
from megatron.config.training import TrainingConfig
from megatron.exits.spec import exit_specs
from megatron.model.gpt import GPT
from megatron.model.partition import partition
from megatron.model.stage import Stage
from megatron.nn import cross_entropy
from megatron.parallel.rng import DropoutStream
from megatron.planning.activations import MAX_LOGITS, Activations
from megatron.testing.tiny import model_config, random_batch

VOCAB, BATCH = 64, 3
SHAPES = {
    "gpt": dict(family="gpt"),
    "hidden dropout": dict(family="gpt", hidden_dropout=0.1),
    "attention dropout": dict(family="gpt", attention_dropout=0.1),
    "geglu": dict(family="gpt", geglu=True, ffn_hidden_size=48),
    "squared relu": dict(family="gpt", squared_relu=True),
    "normed queries": dict(family="gpt", qk_layernorm=True),
    "llama": dict(family="llama"),
    "llama, all heads": dict(family="llama", group_query_attention=False),
    "llama, dropout": dict(family="llama", attention_dropout=0.1, hidden_dropout=0.1),
    "llama, normed queries": dict(family="llama", qk_layernorm=True),
    "llama, a part turns": dict(family="llama", rotary_percent=0.5),
}
RECOMPUTE = {
    "none": TrainingConfig(),
    "selective": TrainingConfig(recompute_granularity="selective"),
    "uniform": TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "block": TrainingConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
}


def kept_bytes(model, exits: ExitConfig, dtype: torch.dtype, training: TrainingConfig, index: int) -> int:
    """Of all storages that a stage's F leaves alive: saved by autograd, or handed to E and B."""
    spec = partition((2, model.num_layers - 2), exit_specs(exits))[index]
    with torch.device("meta"):
        gpt = GPT(model, exits, (spec,), VOCAB, training)
    gpt = gpt.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0, 0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    batch = random_batch(BATCH, model.seq_length, VOCAB)
    received = torch.randn(model.seq_length, BATCH, model.hidden_size, dtype=dtype) if index else None
    held: list[torch.Tensor] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(hold, lambda tensor: tensor):
        found = Stage(gpt, spec=spec).forward(batch, DropoutStream(1, 0, 0), received)
    found.take_hidden()
    handed = [*(tap for taps in found.taps.values() for tap in taps), *(found.context.rope or ())]
    handed += [] if received is None else [received]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*held, *handed)}
    return sum(size for place, size in storages.items() if place not in own)


def counted(model, exits: ExitConfig, dtype: torch.dtype, training: TrainingConfig, index: int) -> int:
    spec = partition((2, model.num_layers - 2), exit_specs(exits))[index]
    elements = torch.empty((), dtype=dtype).element_size()
    return Activations(model, VOCAB, BATCH, elements=elements, kind="cpu").forward(spec, training)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_layer(shape: str, dtype: torch.dtype) -> None:
    model = model_config(**{"num_layers": 5} | SHAPES[shape])
    for index, training in product((0, 1), (RECOMPUTE["none"], RECOMPUTE["selective"])):
        args = (model, ExitConfig(), dtype, training, index)
        assert counted(*args) == pytest.approx(kept_bytes(*args), rel=0.01)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_taps_and_recompute(family: str, recompute: str) -> None:
    model = model_config(family, num_layers=5)
    kinds = (ExitConfig(exit_layer_nums=(1, 4)), ExitConfig(exit_layer_nums=(2, 3), pre_exit=True),
             ExitConfig(exit_layer_nums=(1, 4), use_exit_mlp=True))  # fmt: skip
    for index, exits, dtype in product((0, 1), kinds, (torch.float32, torch.bfloat16)):
        args = (model, exits, dtype, RECOMPUTE[recompute], index)
        assert counted(*args) == pytest.approx(kept_bytes(*args), rel=0.03), (index, exits, dtype)


def test_chunks_of_logits_are_those_of_the_loss() -> None:
    assert MAX_LOGITS == cross_entropy.MAX_LOGITS
