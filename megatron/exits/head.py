"""The head of an early exit: what stands between a tap on the backbone and the output matrix.

Order (EE-LLM): [exit MLP branch] -> [exit block] -> [norm] -> output matrix. Each part is optional.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ExitConfig, ModelConfig
from megatron.exits.spec import ExitSpec
from megatron.nn.kv import LayerKV
from megatron.nn.layer import LayerContext, TransformerLayer
from megatron.nn.linear import OutputLayer
from megatron.nn.mlp import MLP
from megatron.nn.norm import Norm, build_norm
from megatron.parallel.tensor import ALONE, TensorParallel


class ExitHead(nn.Module):
    """Turns a tap into the features an output matrix multiplies.

    Parts that are tied to the model (output matrix, shared final norm) are passed in by the model, not owned.
    """

    def __init__(
        self,
        spec: ExitSpec,
        model: ModelConfig,
        exits: ExitConfig,
        padded_vocab_size: int,
        recompute: bool,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.tp, self.dropout = tp, model.hidden_dropout
        self.shares_final_norm = exits.exit_norm == "final"
        self.branch = MLP(model, tp) if exits.use_exit_mlp else None
        place = f"exit {spec.label}"
        self.block = TransformerLayer(model, place, recompute, tp) if exits.use_exit_block else None
        self.norm = build_norm(model, partial=tp.sequence) if exits.exit_norm == "own" else None
        untied = exits.untie_exit_output_weights
        self.output = OutputLayer(padded_vocab_size, model.hidden_size, tp) if untied else None

    def forward(
        self,
        tap: tuple[Tensor, ...],
        context: LayerContext,
        final_norm: Norm | None,
        cache: LayerKV | None = None,
    ) -> Tensor:
        """tap: (hidden,), or (residual, normed) for an exit MLP, each [s, b, h] -> features [s, b, h].

        `cache` serves the exit block; `final_norm` is used by heads that share it.
        """
        hidden = tap[0] if self.branch is None else self._branch(*tap, context)
        if self.block is not None:
            hidden = self.block(hidden, context, cache).hidden
        norm = final_norm if self.shares_final_norm else self.norm
        return hidden if norm is None else norm(hidden)

    def _branch(self, residual: Tensor, normed: Tensor, context: LayerContext) -> Tensor:
        if context.stream is not None and self.dropout > 0:
            context.stream.enter(f"exit {self.spec.label} branch", sharded=self.tp.sequence)
        return residual + F.dropout(self.branch(normed), self.dropout, self.training)
