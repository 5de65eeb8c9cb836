"""Word and position embedding of the first pipeline stage."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.parallel.rng import DropoutStream


class _Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class Embedding(nn.Module):
    """Token ids to hidden states; adds learned positions where the model has them."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.word = _Table(padded_vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned_absolute"
        self.position = _Table(config.max_positions, config.hidden_size) if learned else None

    def forward(self, tokens: Tensor, position_ids: Tensor | None, stream: DropoutStream | None) -> Tensor:
        """tokens [b, s], position_ids [b, s] (None: 0..s-1) -> hidden [s, b, h]."""
        hidden = F.embedding(tokens.t(), self.word.weight)
        if self.position is not None:
            if position_ids is None:
                hidden = hidden + self.position.weight[: tokens.shape[1], None]
            else:
                hidden = hidden + F.embedding(position_ids.t(), self.position.weight)
        if stream is not None and self.dropout > 0:
            stream.enter("embedding")
            hidden = F.dropout(hidden, self.dropout)
        return hidden
