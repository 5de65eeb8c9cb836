"""Rotary position embedding (half-rotated form), with linear and Llama-3 frequency scaling.

Angles are computed in fp32 or better and rounded to the activations' dtype only as cos and sin.
"""

import math

import torch
from torch import Tensor

from megatron.config.model import ModelConfig

Rope = tuple[Tensor, Tensor]  # cos, sin: [s, rotated channels]


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Angular frequency of each rotated channel pair, [rotated channels / 2]."""
    rotated = int(config.head_dim * config.rotary_percent)
    exponent = torch.arange(0, rotated, 2, dtype=dtype) / rotated
    frequencies = 1.0 / config.rotary_base**exponent
    if config.rotary_seq_len_interpolation_factor:
        frequencies = frequencies / config.rotary_seq_len_interpolation_factor
    return _stretch_low_frequencies(frequencies, config) if config.use_rope_scaling else frequencies


def _stretch_low_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Llama-3 scaling: long waves are stretched by the factor, short ones kept, a smooth ramp between."""
    turns = config.rope_original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / config.rope_scaling_factor * (1 - keep)


def rotary_tables(config: ModelConfig, start: int, stop: int, like: Tensor) -> Rope:
    """cos and sin for positions start..stop-1, [s, rotated channels], in the dtype and on the device of `like`."""
    precise = torch.promote_types(torch.float32, like.dtype)
    positions = torch.arange(start, stop, dtype=precise)
    angles = torch.outer(positions, inverse_frequencies(config, precise))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like), angles.sin().to(like)


def apply_rotary(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the first channels of x [s, b, heads, head dim] by position; the rest pass through."""
    cos, sin = (table[:, None, None] for table in rope)
    rotated = cos.shape[-1]
    head, rest = x[..., :rotated], x[..., rotated:]
    first, second = head.chunk(2, dim=-1)
    turned = head * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
