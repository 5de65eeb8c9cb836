"""LayerNorm and RMSNorm, optionally with weights stored as (weight - 1); statistics in at least fp32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.config.model import ModelConfig
from megatron.parallel.tensor import Split


class Norm(nn.Module):
    """Normalises the last dimension; `zero_centered` is Megatron's LayerNorm-1p.

    partial: a tp rank normalises but a part of the positions or heads.
    """

    def __init__(self, width: int, kind: str, eps: float, zero_centered: bool, partial: bool = False) -> None:
        super().__init__()
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "LayerNorm" else None
        self.split = dict.fromkeys(("weight", "bias"), Split(partial=partial))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> same shape and dtype."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.kind == "RMSNorm":
            return rms_norm(x, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    trained_on_cpu = not x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if trained_on_cpu and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Torch has no CPU kernel for it: autograd's own chain of small steps takes two to six times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx = scale * (g w - n mean(g w n)), dw = sum of g n over all rows; n: normed."""
        normed, weight, scale = ctx.saved_tensors
        products = (grad * normed).reshape(-1, weight.numel())
        weight_grad = products.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        mean = torch.mv(products, weight).div_(weight.numel()).view(scale.shape)
        input_grad = torch.mul(grad, weight, out=products.view(grad.shape))
        return input_grad.addcmul_(normed, mean, value=-1).mul_(scale), weight_grad, None


def build_norm(config: ModelConfig, width: int | None = None, partial: bool = False) -> Norm:
    """The model's kind of norm over `width` channels (default: the hidden size)."""
    return Norm(
        width or config.hidden_size, config.normalization, config.norm_epsilon, config.apply_layernorm_1p, partial
    )
