"""Counts of parameters against models built on the meta device, for every pipeline rank."""

from itertools import product

import pytest
import torch

from megatron.config.model import ExitConfig
from megatron.exits.spec import exit_specs
from megatron.model.gpt import GPT
from megatron.model.partition import partition, stages_of_rank
from megatron.parallel.tensor import TensorParallel
from megatron.planning.parameters import model_parameters, rank_parameters
from megatron.testing.tiny import model_config

VOCAB = 64
EXITS = {
    "none": ExitConfig(),
    "bare": ExitConfig(exit_layer_nums=(2, 3)),
    "owning": ExitConfig(exit_layer_nums=(1, 4), exit_norm="own", untie_exit_output_weights=True, use_exit_mlp=True),
    "sharing": ExitConfig(exit_layer_nums=(2, 4), exit_norm="final", use_exit_block=True),
}


def built(model, exits, stages, tp) -> GPT:
    with torch.device("meta"):
        return GPT(model, exits, stages, VOCAB, tp=TensorParallel(size=tp))


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS)
@pytest.mark.parametrize(
    "model",
    [model_config("gpt"), model_config("llama"), model_config("llama", untie_embeddings_and_output_weights=False),
     model_config("gpt", qk_layernorm=True, add_bias_linear=False, add_qkv_bias=True)],
    ids=["gpt", "llama", "tied llama", "normed gpt"],
)  # fmt: skip
def test_ranks_hold_what_is_counted(model, exits) -> None:
    for (depths, ranks), tp in product((((4,), 1), ((1, 3), 2), ((1, 1, 1, 1), 2), ((1, 1, 1, 1), 4)), (1, 2)):
        stages = partition(depths, exit_specs(exits))
        for rank in range(ranks):
            mine = stages_of_rank(stages, rank, ranks)
            found = rank_parameters(model, exits, mine, VOCAB, tp)
            gpt = built(model, exits, mine, tp)
            sizes = {name: parameter.numel() for name, parameter in gpt.named_parameters()}
            assert found.total == sum(sizes.values())
            assert found.layers == sum(size for name, size in sizes.items() if name.startswith("layers."))


def test_the_whole_model_counts_nothing_twice() -> None:
    model, exits = model_config("gpt"), EXITS["sharing"]
    whole = built(model, exits, partition((4,), exit_specs(exits)), 1)
    expected = sum(parameter.numel() for parameter in whole.parameters())
    assert model_parameters(model, exits, partition((1, 1, 2), exit_specs(exits)), VOCAB) == expected
