"""fp8 products through a stand-in for Transformer Engine, which needs a GPU: what is asked of it, and what it gets."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from megatron.config.model import ExitConfig, ModelConfig
from megatron.errors import ConfigError
from megatron.nn.fp8 import use_fp8
from megatron.testing.tiny import build_gpt

FP8_ASKED: list[str] = []


class Linear(nn.Module):
    """Takes the weight it is given; its products are exact, and counted."""

    def __init__(self, width: int, rows: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=params_dtype, device=device))
        assert self.weight.is_meta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        FP8_ASKED.append("product")
        return nn.functional.linear(x, self.weight)


@contextmanager
def fp8_autocast(enabled: bool, fp8_recipe: SimpleNamespace):
    assert enabled
    FP8_ASKED.append(fp8_recipe.fp8_format.name)
    yield


def install_engine() -> None:
    engine, recipe = ModuleType("transformer_engine.pytorch"), ModuleType("transformer_engine.common.recipe")
    engine.Linear, engine.fp8_autocast = Linear, fp8_autocast
    recipe.Format = Enum("Format", ["E4M3", "HYBRID"])
    recipe.Float8CurrentScaling = lambda fp8_format: SimpleNamespace(fp8_format=fp8_format)
    names = ("transformer_engine", "transformer_engine.common")
    sys.modules.update({name: ModuleType(name) for name in names})
    sys.modules |= {engine.__name__: engine, recipe.__name__: recipe}
    sys.modules["transformer_engine"].pytorch = engine


@pytest.fixture
def engine() -> Iterator[None]:
    before = {name for name in sys.modules if name.startswith("transformer_engine")}
    install_engine()
    FP8_ASKED.clear()
    yield
    for name in [name for name in sys.modules if name.startswith("transformer_engine") and name not in before]:
        del sys.modules[name]


def test_all_products_of_layers_go_through_it_and_no_parameter_is_added(engine: None) -> None:
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, hidden_dropout=0.0)
    model = build_gpt(config, ExitConfig(exit_layer_nums=(1,), use_exit_mlp=True))
    names = [name for name, _ in model.named_parameters()]
    use_fp8(model, "hybrid")
    assert [name for name, _ in model.named_parameters()] == names
    hidden = torch.randn(16, 1, 32)
    model(hidden, model.context(16, hidden), model.stages[0])
    assert FP8_ASKED == ["HYBRID", "product"] * 8  # four matrices in each of two layers


def test_without_it_the_flag_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="--fp8-format needs NVIDIA's Transformer Engine 2"):
        use_fp8(nn.Module(), "e4m3")
