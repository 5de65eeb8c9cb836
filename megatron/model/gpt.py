"""A GPT or Llama backbone with early exits: the layers of one rank's pipeline stages, exit heads, embedding and head.

The backbone knows exits only as taps: it hands out what was asked for at the layers named in a stage's exits.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.training import TrainingConfig
from megatron.exits.head import ExitHead
from megatron.exits.spec import FINAL, ExitSpec
from megatron.model.partition import StageSpec, segments
from megatron.nn.attention import attention_mask
from megatron.nn.embedding import Embedding
from megatron.nn.layer import LayerContext, TransformerLayer
from megatron.nn.linear import OutputLayer
from megatron.nn.norm import build_norm
from megatron.nn.rotary import rotary_tables
from megatron.parallel.rng import DropoutStream
from megatron.parallel.tensor import ALONE, TensorParallel, splits

Taps = dict[str, tuple[Tensor, ...]]  # exit label -> what its head starts from


class GPT(nn.Module):
    """The modules of a rank's stages. Parameters are uninitialised: see `model.init` and `checkpoint`.

    Where a tied head or a shared final norm is used on a rank that doesn't own it, the rank has a copy (`word_copy`,
    `final_norm`); `partition.replicas` says whose gradients are to be summed.
    """

    def __init__(
        self,
        model: ModelConfig,
        exits: ExitConfig,
        stages: tuple[StageSpec, ...],
        padded_vocab_size: int,
        training: TrainingConfig | None = None,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.stages, self.padded_vocab_size, self.tp = model, stages, padded_vocab_size, tp
        training = training or TrainingConfig()
        selective = training.recompute_granularity == "selective"
        self.flags = training
        first, last = (any(flags) for flags in zip(*((stage.is_first, stage.is_last) for stage in stages), strict=True))
        specs = self.exit_specs()
        self.embedding = Embedding(model, padded_vocab_size, tp) if first else None
        self.layers = nn.ModuleDict(
            {
                str(i): TransformerLayer(model, i, selective, tp)
                for stage in stages
                for i in range(stage.first, stage.last)
            }
        )
        self.exits = nn.ModuleDict(
            {spec.label: ExitHead(spec, model, exits, padded_vocab_size, selective, tp) for spec in specs}
        )
        shared_norm = last or (bool(specs) and exits.exit_norm == "final")
        self.final_norm = build_norm(model, partial=tp.sequence) if shared_norm else None
        untied = model.untie_embeddings_and_output_weights
        self.output = OutputLayer(padded_vocab_size, model.hidden_size, tp) if untied and last else None
        tied = (last and not untied) or (bool(specs) and not exits.untie_exit_output_weights)
        self.word_copy = OutputLayer(padded_vocab_size, model.hidden_size, tp) if tied and not first else None
        self.splits = splits(self)  # how the tp ranks share each parameter, by name

    def head_labels(self) -> tuple[str, ...]:
        """Labels of the heads on this rank, shallow first, the final head last."""
        return tuple(label for stage in self.stages for label in stage.heads)

    def exit_specs(self) -> tuple[ExitSpec, ...]:
        """The early exits on this rank, shallow first."""
        return tuple(spec for stage in self.stages for spec in stage.exits)

    def output_weight(self, label: str) -> nn.Parameter:
        """The output matrix `[padded vocab / tp, h]` that head `label` multiplies: its own or a tied one."""
        own = self.output if label == FINAL else self.exits[label].output
        if own is not None:
            return own.weight
        return self.embedding.word.weight if self.embedding is not None else self.word_copy.weight

    def features(self, label: str, tap: tuple[Tensor, ...], context: LayerContext, cache=None) -> Tensor:
        """What head `label` multiplies with its output matrix, [s, b, h]."""
        if label == FINAL:
            return self.final_norm(tap[0])
        return self.exits[label](tap, context, self.final_norm, cache)

    def context(
        self,
        length: int,
        like: Tensor,
        document_ids: Tensor | None = None,
        stream: DropoutStream | None = None,
    ) -> LayerContext:
        """Rotary tables, mask and dropout streams for a forward pass over `length` positions from 0.

        Rotary angles count from the start of the sequence whatever `--reset-position-ids` says: only distances
        matter to them.
        """
        rotary = self.config.position_embedding_type == "rope"
        rope = rotary_tables(self.config, 0, length, like) if rotary else None
        mask = attention_mask(length, length, self.config.window_size, document_ids, like.device)
        return LayerContext(rope, mask, stream)

    def forward(self, hidden: Tensor, context: LayerContext, stage: StageSpec) -> tuple[Tensor, Taps]:
        """Run a stage's layers over hidden [s, b, h]; returns the last hidden state and the taps of its exits."""
        taps: Taps = {}
        for first, last, recompute in segments(stage, self.flags):
            if recompute and torch.is_grad_enabled():
                # Dropout reseeds itself by layer, so a recomputed segment draws the same masks.
                hidden, found = checkpoint(
                    self._segment, stage, first, last, hidden, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, found = self._segment(stage, first, last, hidden, context)
            taps |= found
        for spec in stage.exits:
            if spec.layer == stage.until and spec.tap == "input":  # its layer itself isn't run
                taps[spec.label] = (hidden,)
        if stage.has_final:
            taps[FINAL] = (hidden,)
        return hidden, taps

    def _segment(
        self, stage: StageSpec, first: int, last: int, hidden: Tensor, context: LayerContext
    ) -> tuple[Tensor, Taps]:
        """Layers [first, last): hidden state after them and the taps within."""
        taps: Taps = {}
        for index in range(first, last):
            entering = hidden
            out = self.layers[str(index)](hidden, context)
            hidden = out.hidden
            for spec in stage.exits:
                if spec.layer == index:
                    sources = {
                        "input": (entering,),
                        "mlp": (out.mlp_residual, out.mlp_input),
                        "output": (hidden,),
                    }
                    taps[spec.label] = sources[spec.tap]
        return hidden, taps
