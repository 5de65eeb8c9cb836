"""LayerNorm and RMSNorm, optionally with weights stored as (weight - 1); statistics in at least fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig


class Norm(nn.Module):
    """Normalises the last dimension; `zero_centered` is Megatron's LayerNorm-1p."""

    def __init__(self, width: int, kind: str, eps: float, zero_centered: bool) -> None:
        super().__init__()
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> same shape and dtype."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.kind == "RMSNorm":
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


def build_norm(config: ModelConfig, width: int | None = None) -> Norm:
    """The model's kind of norm over `width` channels (default: the hidden size)."""
    return Norm(width or config.hidden_size, config.normalization, config.norm_epsilon, config.apply_layernorm_1p)
