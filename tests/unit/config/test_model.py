"""Sizes that follow from others."""

import pytest

from megatron.config.model import ModelConfig
from megatron.config.training import PrecisionConfig


@pytest.mark.parametrize(
    ("hidden", "settings", "width"),
    [
        (2048, {"swiglu": True}, 5440),
        (4096, {"swiglu": True}, 10880),
        (5120, {"geglu": True}, 13632),
        (6656, {"swiglu": True}, 17728),
        (2048, {}, 8192),
        (2048, {"swiglu": True, "ffn_hidden_size": 7}, 7),
    ],
)
def test_ffn_size(hidden: int, settings: dict, width: int) -> None:
    assert ModelConfig(hidden_size=hidden, **settings).ffn_size == width


def test_heads() -> None:
    model = ModelConfig(hidden_size=32, num_attention_heads=4)
    assert (model.head_dim, model.num_kv_heads) == (8, 4)
    grouped = ModelConfig(num_attention_heads=4, kv_channels=5, group_query_attention=True, num_query_groups=2)
    assert (grouped.head_dim, grouped.num_kv_heads) == (5, 2)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "gelu_tanh"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"add_bias_linear": False}, "gelu"),
        ({"add_bias_linear": False, "openai_gelu": True}, "gelu_tanh"),
        ({"geglu": True, "bias_gelu_fusion": False}, "gelu_tanh"),
        ({"swiglu": True}, "silu"),
        ({"squared_relu": True}, "relu2"),
    ],
)
def test_activation(settings: dict, name: str) -> None:
    assert ModelConfig(**settings).activation == name


def test_positions_and_biases() -> None:
    assert ModelConfig(seq_length=8).max_positions == 8
    assert ModelConfig(seq_length=8, max_position_embeddings=16).max_positions == 16
    assert ModelConfig(add_bias_linear=False, add_qkv_bias=True).qkv_bias
    assert not ModelConfig(add_bias_linear=False).qkv_bias


def test_dtype() -> None:
    names = [PrecisionConfig(**s).params_dtype for s in ({}, {"fp16": True}, {"bf16": True})]
    assert names == ["float32", "float16", "bfloat16"]
