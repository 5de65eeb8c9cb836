"""Makes each rank's accumulated gradients those of the whole step, and counts every parameter once in their norm.

In this order: sums over tp of what each rank saw but a part of the uses of; sums over data-parallel ranks (the mean is
taken where losses are weighed); sums over the stages that hold copies of one parameter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import all_gather, reduce_scatter

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


def own_rows(parameter: Tensor, mesh: Mesh, rank: int | None = None) -> slice:
    """The rows of a parameter that a data-parallel rank (default: this one) updates, of a sharded optimizer."""
    rows, size = parameter.shape[0], mesh.size("dp")
    rank = mesh.rank("dp") if rank is None else rank
    return slice(rows * rank // size, rows * (rank + 1) // size)


class GradientSync:
    """Sums of gradients over the ranks of a mesh; does nothing where there is one.

    sharded: each data-parallel rank gets the sums of its rows alone (ZeRO-1, arXiv 1910.02054), and hands out the
    parameters' rows after it has updated them.
    """

    def __init__(
        self, mesh: Mesh, parameters: Mapping[str, nn.Parameter], shared: Shared, sharded: bool = False
    ) -> None:
        self._mesh, self._parameters, self._shared = mesh, parameters, shared
        self._counted = shared.counted(parameters, mesh)
        self.sharded = sharded and mesh.size("dp") > 1

    def own(self, tensor: Tensor) -> Tensor:
        """The rows of a parameter, or of its gradient, that this rank updates: all where nothing is sharded."""
        return tensor[own_rows(tensor, self._mesh)] if self.sharded else tensor

    def first_row(self, parameter: Tensor) -> int:
        """Where `own` begins."""
        return own_rows(parameter, self._mesh).start if self.sharded else 0

    def reduce(self) -> None:
        """Sum all gradients, in place. Every rank must call this."""
        shared, names = self._shared, self._parameters.keys()
        _sum(self._grads(name for name in names if name in shared.partial), self._mesh.group("tp"))
        if self.sharded:
            self._reduce_rows()
        else:
            _sum(self._grads(names), self._mesh.group("dp"))
        for group, copied in shared.copies:  # last: then the copies' gradients are the same to the bit
            _sum([self.own(grad) for grad in self._grads(name for name in copied if name in names)], group)

    def hand_out(self) -> None:
        """Give every data-parallel rank the rows that the others have updated. Every rank must call this."""
        if not self.sharded:
            return
        for bucket in _alike([p.detach() for p in self._parameters.values()]):
            segments = self._segments(bucket)
            mine = segments[self._mesh.rank("dp")]
            whole = mine.new_empty(len(segments) * mine.numel())
            all_gather(whole, mine, group=self._mesh.group("dp"))
            for rank, segment in enumerate(whole.chunk(len(segments))):
                self._scatter(segment, bucket, rank)

    def total_norm(self) -> float:
        """L2 norm of the gradients of the whole model, each parameter counted once. Every rank must call this."""
        return self.norm_of([self.own(parameter.main_grad) for parameter in self._counted.values()])

    def parameter_norm(self, masters: Mapping[str, Tensor]) -> float:
        """L2 norm of the whole model's parameters. Every rank must call this."""
        return self.norm_of([masters[name] for name in self._counted if name in masters])

    def norm_of(self, tensors: list[Tensor]) -> float:
        """L2 norm of what all ranks hold, which data-parallel ranks have parts of (sharded) or copies."""
        norm = torch.nn.utils.get_total_norm(tensors, 2.0) if tensors else torch.zeros(())
        if self._mesh.world_size == 1:
            return float(norm)
        square = norm.double().square().to(self._mesh.backend.device)
        return math.sqrt(float(self._mesh.sum(square)) / self._copies)

    def count_zeros(self) -> int:
        """How many of the whole model's gradients are exactly zero. Every rank must call this."""
        zeros = torch.zeros((), dtype=torch.float64, device=self._mesh.backend.device)
        for parameter in self._counted.values():
            zeros += (self.own(parameter.main_grad) == 0).sum()
        return int(self._mesh.sum(zeros)) // self._copies

    @property
    def _copies(self) -> int:
        return 1 if self.sharded else self._mesh.size("dp")

    def _grads(self, names: Iterable[str]) -> list[Tensor]:
        return [self._parameters[name].main_grad for name in names]

    def _reduce_rows(self) -> None:
        rank = self._mesh.rank("dp")
        for bucket in _alike(self._grads(self._parameters)):
            segments = self._segments(bucket)
            mine = torch.empty_like(segments[rank])
            reduce_scatter(mine, torch.cat(segments), group=self._mesh.group("dp"))
            self._scatter(mine, bucket, rank)

    def _segments(self, bucket: list[Tensor]) -> list[Tensor]:
        """For each data-parallel rank its rows of all tensors of a bucket, in one; padded to the longest."""
        rows = [
            torch.cat([tensor[own_rows(tensor, self._mesh, rank)].flatten() for tensor in bucket])
            for rank in range(self._mesh.size("dp"))
        ]
        longest = max(segment.numel() for segment in rows)
        missing = [longest - segment.numel() for segment in rows]
        return [torch.nn.functional.pad(s, (0, lack)) if lack else s for s, lack in zip(rows, missing, strict=True)]

    def _scatter(self, segment: Tensor, bucket: list[Tensor], rank: int) -> None:
        """Inverse of `_segments` for one rank's."""
        targets = [tensor[own_rows(tensor, self._mesh, rank)] for tensor in bucket]
        parts = segment[: sum(target.numel() for target in targets)].split([target.numel() for target in targets])
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part.view_as(target))


def _sum(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum over a group in place, many small tensors in one message."""
    if group is None:
        return
    for bucket in _alike(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])


def _alike(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Buckets of tensors of one type, each as large as is sent at once."""
    found: list[list[Tensor]] = []
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        size = _BUCKET
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if size + tensor.numel() > _BUCKET:
                found.append([])
                size = 0
            found[-1].append(tensor)
            size += tensor.numel()
    return found
