"""The MLP of a layer: plain or gated, with the activations of the GPT and Llama families."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.nn.linear import Linear


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu2": _squared_relu}


class MLP(nn.Module):
    """h -> ffn -> h. Gated: `up` holds the gate's rows first, then the up projection's (Megatron's layout)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        rows = config.ffn_size * (2 if self.gated else 1)
        self.up = Linear(config.hidden_size, rows, config.add_bias_linear)
        self.down = Linear(config.ffn_size, config.hidden_size, config.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> [s, b, h]."""
        inner = self.up(x)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        return self.down(self.activation(inner))
