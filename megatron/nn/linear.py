"""Linear layers by their parallel role: where their weight is cut once tensor parallelism is on.

`column` layers are cut along their outputs, `row` layers along their inputs; the role is kept on the module so
that checkpoints and later the tp collectives find it in one place.
"""

import torch
from torch import nn


class Linear(nn.Linear):
    """`y = x W^T + b` with its parallel role (`column` or `row`); weights are filled by `model.init`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, role: str) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.role = role

    def reset_parameters(self) -> None:
        """Leave memory as it is: every parameter is initialised or loaded by name afterwards."""


class OutputLayer(nn.Module):
    """A vocabulary-sized output matrix `[padded vocab, hidden]` without bias; losses use its weight directly."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
