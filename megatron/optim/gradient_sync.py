"""Makes each rank's accumulated gradients those of the whole step, and counts every parameter once in their norm.

In this order: sums over tp of what each rank saw but a part of the uses of; sums over the stages that hold copies of one
parameter; sums over data-parallel ranks (the mean is taken where losses are weighed).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.parallel.mesh import Mesh

_BUCKET = 1 << 23  # elements that are sent together


@dataclass(frozen=True)
class Shared:
    """What the ranks of a mesh have in common of one rank's parameters, by name.

    partial: whole on each tp rank, gradients to be summed over tp. cut: of which each tp rank holds a part. copies:
    (group, names) of parameters that other pipeline stages hold, too; foreign: those of them that another stage owns.
    """

    partial: frozenset[str] = frozenset()
    cut: frozenset[str] = frozenset()
    copies: Sequence[tuple[dist.ProcessGroup, tuple[str, ...]]] = ()
    foreign: frozenset[str] = frozenset()


class GradientSync:
    """Sums of gradients over the ranks of a mesh; does nothing where there is one."""

    def __init__(self, mesh: Mesh, parameters: Mapping[str, nn.Parameter], shared: Shared) -> None:
        self._mesh, self._parameters, self._shared = mesh, parameters, shared
        first = mesh.rank("tp") == 0
        self._counted = [
            parameter
            for name, parameter in parameters.items()
            if name not in shared.foreign and (first or name in shared.cut)
        ]

    def reduce(self) -> None:
        """Sum all gradients, in place. Every rank must call this."""
        shared, names = self._shared, self._parameters.keys()
        _sum(self._grads(name for name in names if name in shared.partial), self._mesh.group("tp"))
        for group, copied in shared.copies:
            _sum(self._grads(name for name in copied if name in names), group)
        _sum(self._grads(names), self._mesh.group("dp"))

    def total_norm(self) -> float:
        """L2 norm of the gradients of the whole model, each parameter counted once. Every rank must call this."""
        grads = [parameter.main_grad for parameter in self._counted]
        if self._mesh.world_size == 1:
            return float(torch.nn.utils.get_total_norm(grads, 2.0))
        norm = torch.nn.utils.get_total_norm(grads, 2.0) if grads else torch.zeros(())
        square = norm.double().square().to(self._mesh.backend.device)
        return float((self._mesh.sum(square) / self._mesh.size("dp")).sqrt())

    def _grads(self, names: Iterable[str]) -> list[Tensor]:
        return [self._parameters[name].main_grad for name in names]


def _sum(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum over a group in place, many small tensors in one message."""
    if group is None:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        for bucket in _buckets([tensor for tensor in tensors if tensor.dtype == dtype]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat, group=group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    size = _BUCKET
    for tensor in tensors:
        if size + tensor.numel() > _BUCKET:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.numel()
    return found
