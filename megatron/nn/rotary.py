"""Rotary position embedding (half-rotated form), with linear and Llama-3 frequency scaling.

Angles are computed in fp32 or better and rounded to the activations' dtype only as cos and sin.
"""

import math

import torch
from torch import Tensor

from megatron.config.model import ModelConfig

# cos, sin: [s, rotated channels]; the first half of the channels sees the second through -sin, the second the first
# through sin, which is how the table holds them
Rope = tuple[Tensor, Tensor]


def inverse_frequencies(
    config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Angular frequency of each rotated channel pair, [rotated channels / 2]."""
    rotated = int(config.head_dim * config.rotary_percent)
    exponent = torch.arange(0, rotated, 2, dtype=dtype, device=device) / rotated
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
    """The tables for positions start..stop-1, in the dtype and on the device of `like`."""
    precise = torch.promote_types(torch.float32, like.dtype)
    positions = torch.arange(start, stop, dtype=precise, device=like.device)
    angles = torch.outer(positions, inverse_frequencies(config, precise, like.device))
    cos, sin = angles.cos().to(like), angles.sin().to(like)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the first channels of x [s, ..., head dim] by position; the rest pass through."""
    cos, sin = (table.view(len(table), *(1,) * (x.dim() - 2), -1) for table in rope)
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


class _Rotation(torch.autograd.Function):
    """Channel i of the first half turns with channel i of the second; the gradient turns back.

    Written out because autograd would keep four intermediates of the size of x and take twice the passes over memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    rotated = cos.shape[-1]
    turning = x[..., :rotated].contiguous()  # one copy, so that what follows runs over long rows
    turned = (turning * cos).addcmul_(turning.roll(rotated // 2, -1), sin, value=direction)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)
