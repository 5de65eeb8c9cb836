"""One pre-norm transformer layer. It publishes what exits may tap, and knows nothing about exits."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.nn.attention import SelfAttention
from megatron.nn.kv import LayerKV
from megatron.nn.mlp import MLP
from megatron.nn.norm import build_norm
from megatron.nn.rotary import Rope
from megatron.parallel.rng import DropoutStream
from megatron.parallel.tensor import ALONE, TensorParallel


@dataclass(frozen=True)
class LayerContext:
    """What all layers of one forward pass share: rotary tables, mask, dropout streams (None: no dropout)."""

    rope: Rope | None = None
    mask: Tensor | None = None
    stream: DropoutStream | None = None


class LayerOutput(NamedTuple):
    """The layer's output and the two inputs of its MLP branch, each [s, b, h]."""

    hidden: Tensor
    mlp_residual: Tensor
    mlp_input: Tensor


class TransformerLayer(nn.Module):
    """norm -> attention -> add -> norm -> MLP -> add; `place` names its dropout stream."""

    def __init__(
        self, config: ModelConfig, place: int | str, recompute_core: bool = False, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.tp, self.place = tp, place
        self.dropout = config.hidden_dropout
        self.uses_dropout = config.hidden_dropout > 0 or config.attention_dropout > 0
        self.post_norm_residual = config.apply_residual_connection_post_layernorm
        self.input_norm = build_norm(config, partial=tp.sequence)
        self.attention = SelfAttention(config, recompute_core, tp)
        self.mlp_norm = build_norm(config, partial=tp.sequence)
        self.mlp = MLP(config, tp)

    def forward(self, hidden: Tensor, context: LayerContext, cache: LayerKV | None = None) -> LayerOutput:
        """hidden [s, b, h] -> LayerOutput; with a cache, hidden are the positions after those cached."""
        stream = context.stream if self.uses_dropout else None
        if stream is not None:
            stream.enter(self.place, sharded=self.tp.size > 1)  # of the heads' probabilities
        return self._run(hidden, context.rope, context.mask, cache, stream if self.tp.size > 1 else None)

    def compile_body(self) -> None:
        """Run the layer's computation through torch.compile from now on."""
        self._run = torch.compile(self._run)

    def _run(
        self,
        hidden: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        cache: LayerKV | None,
        stream: DropoutStream | None = None,
    ) -> LayerOutput:
        """`stream`: given where hidden states draw other numbers than attention, as tp ranks do."""
        normed = self.input_norm(hidden)
        residual = normed if self.post_norm_residual else hidden
        attended = self.attention(normed, rope, mask, cache)
        if stream is not None:
            stream.enter(f"{self.place} hidden", sharded=self.tp.sequence)
        hidden = residual + self._drop(attended)
        normed = self.mlp_norm(hidden)
        residual = normed if self.post_norm_residual else hidden
        return LayerOutput(residual + self._drop(self.mlp(normed)), residual, normed)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x
