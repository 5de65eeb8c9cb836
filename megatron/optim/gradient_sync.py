"""Makes each rank's accumulated gradients those of the whole step, and counts every parameter once in their norm.

In this order: sums over tp of what each rank saw but a part of the uses of; sums over the stages that hold copies of
one parameter; sums over data-parallel ranks (the mean is taken where losses are weighed).
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

    def counted(self, parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> dict[str, nn.Parameter]:
        """Those that this rank counts, so that all ranks of a data-parallel one count each parameter once."""
        first = mesh.rank("tp") == 0
        return {
            name: parameter
            for name, parameter in parameters.items()
            if name not in self.foreign and (first or name in self.cut)
        }


class GradientSync:
    """Sums of gradients over the ranks of a mesh; does nothing where there is one."""

    def __init__(self, mesh: Mesh, parameters: Mapping[str, nn.Parameter], shared: Shared) -> None:
        self._mesh, self._parameters, self._shared = mesh, parameters, shared
        self._counted = shared.counted(parameters, mesh)

    def reduce(self) -> None:
        """Sum all gradients, in place. Every rank must call this."""
        shared, names = self._shared, self._parameters.keys()
        _sum(self._grads(name for name in names if name in shared.partial), self._mesh.group("tp"))
        for group, copied in shared.copies:
            _sum(self._grads(name for name in copied if name in names), group)
        _sum(self._grads(names), self._mesh.group("dp"))

    def total_norm(self) -> float:
        """L2 norm of the gradients of the whole model, each parameter counted once. Every rank must call this."""
        return self.norm_of([parameter.main_grad for parameter in self._counted.values()])

    def parameter_norm(self, masters: Mapping[str, Tensor]) -> float:
        """L2 norm of the whole model's parameters. Every rank must call this."""
        return self.norm_of([masters[name] for name in self._counted])

    def norm_of(self, tensors: list[Tensor]) -> float:
        """L2 norm of what all ranks hold of something that data-parallel ranks have copies of."""
        norm = torch.nn.utils.get_total_norm(tensors, 2.0) if tensors else torch.zeros(())
        if self._mesh.world_size == 1:
            return float(norm)
        square = norm.double().square().to(self._mesh.backend.device)
        return float((self._mesh.sum(square) / self._mesh.size("dp")).sqrt())

    def count_zeros(self) -> int:
        """How many of the whole model's gradients are exactly zero. Every rank must call this."""
        device = self._mesh.backend.device
        zeros = sum(((p.main_grad == 0).sum() for p in self._counted.values()), torch.zeros((), device=device))
        return int(self._mesh.sum(zeros.double())) // self._mesh.size("dp")

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
