import math

import pytest
import torch

from megatron.config.model import ExitConfig
from megatron.exits.spec import exit_specs
from megatron.model.gpt import GPT
from megatron.model.init import initialise
from megatron.model.names import model_state
from megatron.model.partition import partition
from megatron.parallel.placement import views
from megatron.testing.tiny import model_config


def fresh(model, exits=None, seed=1, rows=64):
    exits = exits or ExitConfig()
    gpt = GPT(model, exits, partition((model.num_layers,), exit_specs(exits)), rows)
    initialise(gpt, seed, vocab_size=60)
    return gpt


def test_distributions():
    exits = ExitConfig(exit_layer_nums=(2,), use_exit_mlp=True, untie_exit_output_weights=True, exit_norm="own")
    model = model_config(hidden_size=128, init_method_std=0.05)
    for name, p in fresh(model, exits).named_parameters():
        if name.endswith(".bias"):
            assert not p.any()
        elif p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:
            writes_residual = name.endswith((".proj.weight", ".down.weight"))
            std = 0.05 / math.sqrt(8) if writes_residual else 0.05
            assert p.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(p.mean().item()) < std / 5


def test_layernorm_1p_starts_at_zero():
    gpt = fresh(model_config(apply_layernorm_1p=True))
    assert not gpt.final_norm.weight.any()


def test_same_values_whatever_else_is_in_the_model():
    """A tensor's values depend on seed and name alone: exits, padding and dtype of others change nothing."""
    plain = views(model_state(fresh(model_config("llama")), 60))
    exits = ExitConfig(exit_layer_nums=(1, 2), use_exit_block=True, untie_exit_output_weights=True)
    richer = views(model_state(fresh(model_config("llama"), exits, rows=128), 60))
    for name, value in plain.items():
        if not name.endswith(".padding"):
            assert torch.equal(value, richer[name]), name
    other = views(model_state(fresh(model_config("llama"), seed=2), 60))
    assert not torch.equal(plain["layers.0.mlp.gate.weight"], other["layers.0.mlp.gate.weight"])
    assert not torch.equal(plain["layers.0.mlp.gate.weight"], plain["layers.0.mlp.up.weight"])
