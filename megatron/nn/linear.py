"""Linear layers whose memory is filled by name afterwards: by `model.init` or from a checkpoint."""

import torch
from torch import nn


class Linear(nn.Linear):
    """`y = x W^T + b` without initial values of its own."""

    def reset_parameters(self) -> None:
        """Leave memory as it is."""


class OutputLayer(nn.Module):
    """A vocabulary-sized output matrix `[padded vocab, hidden]` without bias; losses use its weight directly."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
