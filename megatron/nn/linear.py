"""Linear layers whose memory is filled by name afterwards: by `model.init` or from a checkpoint.

With tensor parallelism a column-parallel layer holds some rows of its matrix and opens a region, a row-parallel one
holds some columns and closes it (`parallel.tensor`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.tensor import ALONE, Split, TensorParallel, linear


class ColumnParallelLinear(nn.Module):
    """`y = x W^T + b`; each rank computes its share of the outputs."""

    def __init__(self, width: int, rows: int, bias: bool, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(tp.share(rows), width))
        self.bias = nn.Parameter(torch.empty(tp.share(rows))) if bias else None
        self.split = {"weight": Split(0), "bias": Split(0)}

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, width] (with sequence parallelism this rank's positions) -> [s, b, rows / tp]."""
        return linear(x, self.weight, self.bias, self.tp)


class RowParallelLinear(nn.Module):
    """`y = x W^T + b`; each rank has its share of the inputs, and the results are summed."""

    def __init__(self, width: int, rows: int, bias: bool, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(rows, tp.share(width)))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.split = {"weight": Split(1), "bias": Split(partial=tp.sequence)}

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, width / tp] -> [s, b, rows] (with sequence parallelism this rank's positions)."""
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = self.tp.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class OutputLayer(nn.Module):
    """A vocabulary-sized output matrix `[padded vocab / tp, hidden]` without bias; losses use its weight directly."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tp.share(vocab_size), hidden_size))
        self.split = {"weight": Split(0)}
