"""Word and position embedding of the first pipeline stage."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.parallel.rng import DropoutStream
from megatron.parallel.tensor import ALONE, Split, TensorParallel


class _Table(nn.Module):
    def __init__(self, rows: int, width: int, split: Split) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.split = {"weight": split}


class Embedding(nn.Module):
    """Token ids to hidden states; adds learned positions where the model has them. Each tp rank has some of the ids."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp, self.dropout = tp, config.hidden_dropout
        self.word = _Table(tp.share(padded_vocab_size), config.hidden_size, Split(0))
        learned = config.position_embedding_type == "learned_absolute"
        whole = Split(partial=tp.sequence)
        self.position = _Table(config.max_positions, config.hidden_size, whole) if learned else None

    def forward(self, tokens: Tensor, position_ids: Tensor | None, stream: DropoutStream | None) -> Tensor:
        """tokens [b, s], position_ids [b, s] (None: 0..s-1) -> hidden [s, b, h] (or this rank's positions of it)."""
        hidden = self._words(tokens.t())
        if self.position is not None:
            if position_ids is None:
                places = self.position.weight[: tokens.shape[1], None]
            else:
                places = F.embedding(position_ids.t(), self.position.weight)
            hidden = hidden + self.tp.own_part(places)
        if stream is not None and self.dropout > 0:
            stream.enter("embedding", sharded=self.tp.sequence)
            hidden = F.dropout(hidden, self.dropout, self.training)
        return hidden

    def _words(self, tokens: Tensor) -> Tensor:
        """Rows of the table that the ranks share, [s, b, h]: each adds those that it has."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.word.weight)
        local = tokens - self.tp.rank * self.word.weight.shape[0]
        inside = (local >= 0) & (local < self.word.weight.shape[0])
        return self.tp.leave(F.embedding(local.where(inside, 0), self.word.weight) * inside[..., None])
