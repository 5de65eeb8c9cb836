"""Tensor and sequence parallelism inside a layer: which part this rank holds, and the collectives at the borders.

A layer is cut between two borders (Megatron-LM, arXiv 1909.08053; sequence parallelism: arXiv 2205.05198). Every rank
has the whole input of the region between them and a part of its parameters; what comes out is a sum over the ranks.
With sequence parallelism hidden states outside such regions are cut along their first dimension, the sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.parallel.mesh import Mesh

# torch 2.13 renamed them.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each layer. sequence: hidden states between regions are cut along the sequence."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sequence: bool = False

    @staticmethod
    def of(mesh: Mesh, sequence: bool) -> "TensorParallel":
        """This rank's place along the mesh's tp axis."""
        size = mesh.size("tp")
        return TensorParallel(size, mesh.rank("tp"), mesh.group("tp"), sequence and size > 1)

    def share(self, whole: int) -> int:
        """How many of `whole` rows, heads or positions each rank has; they must divide."""
        assert whole % self.size == 0, f"{whole} does not divide by tp={self.size}"
        return whole // self.size

    def enter(self, x: Tensor) -> Tensor:
        """Into a region: whole hidden states; the gradient is the sum over the ranks."""
        return x if self.size == 1 else _Enter.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a region: the sum over the ranks, with sequence parallelism this rank's part of it."""
        return x if self.size == 1 else _Leave.apply(x, self)

    def own_part(self, x: Tensor) -> Tensor:
        """This rank's positions of a hidden state that all ranks have (its gradient is of that part alone)."""
        return x.chunk(self.size, dim=0)[self.rank] if self.sequence else x

    def gather(self, x: Tensor) -> Tensor:
        """Whole hidden states of those cut along the sequence; without autograd."""
        if not self.sequence:
            return x
        whole, work = self.start_gather(x)
        work.wait()
        return whole

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of what lies inside a region (this rank's part of it); without autograd, may write x."""
        if self.size == 1:
            return x
        part, work = self.start_reduce(x)
        work.wait()
        return part

    def start_gather(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Begin to `gather`: the result is good once the work is waited for."""
        whole = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        return whole, all_gather(whole, x.contiguous(), group=self.group, async_op=True)

    def start_reduce(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Begin to `reduce`: the result is good once the work is waited for."""
        x = x.contiguous()
        if not self.sequence:
            return x, dist.all_reduce(x, group=self.group, async_op=True)
        part = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return part, reduce_scatter(part, x, group=self.group, async_op=True)


ALONE = TensorParallel()


@dataclass(frozen=True)
class Split:
    """How the tp ranks share a parameter.

    dim: along which each holds its part (None: each holds the whole). partial: each sees but a part of the whole
    parameter's uses, so that gradients are to be summed over tp.
    """

    dim: int | None = None
    partial: bool = False


def splits(model: nn.Module) -> dict[str, Split]:
    """Name -> split, for all parameters. A module says it in `split`, a dict by its own parameters' names."""
    return {
        f"{prefix}.{name}".lstrip("."): getattr(module, "split", {}).get(name, Split())
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.gather(x) if tp.sequence else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.reduce(grad if ctx.tp.sequence else grad.clone()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.reduce(x if tp.sequence else x.clone())  # which sums in place unless it cuts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.gather(grad), None
