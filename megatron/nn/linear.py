"""Linear layers whose memory is filled by name afterwards: by `model.init` or from a checkpoint.

With tensor parallelism a column-parallel layer holds some rows of its matrix and opens a region, a row-parallel one
holds some columns and closes it (`parallel.tensor`). Under zero-bubble schedules the gradients of matrices wait in
`WeightGradients` until their turn (arXiv 2401.10241). `product` stands for x W^T where another kernel makes it
(`nn.fp8`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.parallel.tensor import ALONE, Split, TensorParallel


class WeightGradients:
    """The second half of a backward pass: what is to be added to matrices' gradients, kept while `deferring`."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] | None = None

    @contextmanager
    def deferring(self) -> Iterator[list[Callable[[], None]]]:
        """Collect in the list that is given what backward passes within the block would do to matrices."""
        self._waiting = waiting = []
        try:
            yield waiting
        finally:
            self._waiting = None

    @property
    def waits(self) -> bool:
        """Whether backward passes are within a `deferring` block."""
        return self._waiting is not None

    def keep(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """What is to be added to the gradient of `weight` later."""

        @torch.no_grad()
        def add() -> None:
            weight.main_grad.add_(compute())

        self._waiting.append(add)


class ColumnParallelLinear(nn.Module):
    """`y = x W^T + b`; each rank computes its share of the outputs."""

    def __init__(self, width: int, rows: int, bias: bool, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp, self.later, self.product = tp, None, None
        self.weight = nn.Parameter(torch.empty(tp.share(rows), width))
        self.bias = nn.Parameter(torch.empty(tp.share(rows))) if bias else None
        self.split = {"weight": Split(0), "bias": Split(0)}

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, width] (with sequence parallelism this rank's positions) -> [s, b, rows / tp]."""
        if self.product is not None:
            y = self.product(self.tp.enter(x))
            return y if self.bias is None else y + self.bias
        if self.tp.size == 1 and self.later is None:
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias, self.tp, self.later)


class RowParallelLinear(nn.Module):
    """`y = x W^T + b`; each rank has its share of the inputs, and the results are summed."""

    def __init__(self, width: int, rows: int, bias: bool, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp, self.later, self.product = tp, None, None
        self.weight = nn.Parameter(torch.empty(rows, tp.share(width)))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.split = {"weight": Split(1), "bias": Split(partial=tp.sequence)}

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, width / tp] -> [s, b, rows] (with sequence parallelism this rank's positions)."""
        if self.tp.size == 1 and self.later is None and self.product is None:
            return F.linear(x, self.weight, self.bias)
        if self.product is not None:
            y = self.product(x)
        elif self.later is None:
            y = F.linear(x, self.weight)
        else:
            y = _Linear.apply(x, self.weight, None, ALONE, self.later)
        y = self.tp.leave(y)
        return y if self.bias is None else y + self.bias


def defer_weight_gradients(model: nn.Module) -> WeightGradients:
    """Let all linear layers of a model keep their matrices' gradients for later where they are asked to."""
    later = WeightGradients()
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.later = later
    return later


class OutputLayer(nn.Module):
    """A vocabulary-sized output matrix `[padded vocab / tp, hidden]` without bias; losses use its weight directly."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tp.share(vocab_size), hidden_size))
        self.split = {"weight": Split(0)}


class _Linear(torch.autograd.Function):
    """Enter a region and multiply; the gradients' collectives overlap with computing them.

    With sequence parallelism the input is kept cut, and gathered once more for the matrix's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None,
        tp: TensorParallel,
        later: WeightGradients | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.later, ctx.weight, ctx.has_bias = tp, later or _NOW, weight, bias is not None
        return F.linear(tp.gather(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x, weight), tp = ctx.saved_tensors, ctx.tp
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        rows, now = grad.flatten(0, -2), for_weight and not ctx.later.waits
        whole, gathering = tp.start_gather(x) if now and tp.sequence else (x, None)
        x_grad = grad @ weight if for_x else None  # while the input is gathered
        if gathering is not None:
            gathering.wait()
        reducing = weight_grad = None
        if for_x and tp.size > 1:
            x_grad, reducing = tp.start_reduce(x_grad)  # while the matrix's gradient is computed
        if now:
            weight_grad = rows.t() @ whole.flatten(0, -2)
        elif for_weight:
            ctx.later.keep(ctx.weight, lambda: rows.t() @ tp.gather(x).flatten(0, -2))
        bias_grad = rows.sum(0) if ctx.has_bias and for_bias else None
        if reducing is not None:
            reducing.wait()
        return x_grad, weight_grad, bias_grad, None, None


_NOW = WeightGradients()
