"""The MLP of a layer: plain or gated, with the activations of the GPT and Llama families."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.config.model import ModelConfig
from megatron.nn.linear import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.tensor import ALONE, TensorParallel


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu2": _squared_relu}


class MLP(nn.Module):
    """h -> ffn -> h. Gated: `up` holds this rank's rows of the gate, then of the up projection (Megatron's layout)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        rows = config.ffn_size * (2 if self.gated else 1)
        self.up = ColumnParallelLinear(config.hidden_size, rows, config.add_bias_linear, tp)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, config.add_bias_linear, tp)

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> [s, b, h]."""
        inner = self.up(x)
        if not self.gated:
            return self.down(self.activation(inner))
        if self.activation is F.silu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.down(_SwiGLU.apply(inner))
        gate, up = inner.chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, both in one tensor. Autograd would keep silu(gate) as well, and copy the gradients together."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        gate, up = packed.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        gate, up = packed.chunk(2, dim=-1)
        result = torch.empty_like(packed)
        gate_grad, up_grad = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return result
