"""Which gradients travel together: buckets of parameters, and which rows of them each data-parallel rank updates.

With a sharded optimizer (ZeRO-1, arXiv 1910.02054) each data-parallel rank updates its rows of every parameter. A large
parameter then travels in several parts, so that sorting its rows by rank never takes a copy of all of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.parallel.mesh import Mesh

BUCKET = 1 << 23  # elements that are sent together


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are summed in one message; of a sharded optimizer's, part `part` of `parts` of each
    rank's rows."""

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1


def make_buckets(
    parameters: Mapping[str, nn.Parameter], names: Iterable[str], sharded: bool, most: int = BUCKET
) -> tuple[Bucket, ...]:
    """Buckets of at most so many elements each, or of one larger parameter, in the order of `names`."""
    buckets: list[Bucket] = []
    room, kind = 0, None
    for name in names:
        parameter = parameters[name]
        size, dtypes = parameter.numel(), (parameter.dtype, parameter.main_grad.dtype)
        if size > most and sharded:
            parts = -(-size // most)
            buckets += [Bucket((name,), part, parts) for part in range(parts)]
            room = 0
        elif size <= room and dtypes == kind:
            buckets[-1] = Bucket((*buckets[-1].names, name))
            room -= size
        else:
            buckets.append(Bucket((name,)))
            room, kind = most - size, dtypes
    return tuple(buckets)


def own_rows(parameter: Tensor, mesh: Mesh, rank: int | None = None) -> slice:
    """The rows of a parameter that a data-parallel rank (default: this one) updates, of a sharded optimizer."""
    rows, size = parameter.shape[0], mesh.size("dp")
    rank = mesh.rank("dp") if rank is None else rank
    return slice(rows * rank // size, rows * (rank + 1) // size)


class Segments:
    """The rows of a bucket sorted by the data-parallel rank that updates them, each rank's in one piece.

    Pieces have one length, that of the longest: collectives want it so. Where all ranks have as many rows, tensors are
    sorted in one copy each, however many ranks there are.
    """

    def __init__(self, bucket: Bucket, tensors: Sequence[Tensor], mesh: Mesh) -> None:
        self._size = mesh.size("dp")
        self._rows = [
            [tensor[_part(own_rows(tensor, mesh, rank), bucket)] for tensor in tensors] for rank in range(self._size)
        ]
        self.length = max(sum(rows.numel() for rows in mine) for mine in self._rows)
        even = all(tensor.shape[0] % self._size == 0 for tensor in tensors)
        self._even = [self._by_rank(tensor, bucket) for tensor in tensors] if even else None

    def gather(self, rank: int) -> Tensor:
        """One rank's piece, as a copy."""
        piece = self._rows[rank][0].new_zeros(self.length)
        for into, rows in self._pairs(piece, rank):
            into.copy_(rows)
        return piece

    def gather_all(self) -> Tensor:
        """The pieces of all ranks, one after the other."""
        whole = self._rows[0][0].new_zeros(self._size * self.length)
        for into, rows in self._all_pairs(whole):
            into.copy_(rows)
        return whole

    def scatter(self, piece: Tensor, rank: int) -> None:
        """Write a rank's piece back into its rows."""
        for source, rows in self._pairs(piece, rank):
            rows.copy_(source)

    def scatter_all(self, whole: Tensor) -> None:
        """Inverse of `gather_all`."""
        for source, rows in self._all_pairs(whole):
            rows.copy_(source)

    def _by_rank(self, tensor: Tensor, bucket: Bucket) -> Tensor:
        """[ranks, rows of each in the bucket, ...]."""
        share = tensor.shape[0] // self._size
        return tensor.unflatten(0, (self._size, share))[:, _part(slice(0, share), bucket)]

    def _all_pairs(self, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if self._even is None:
            for rank, piece in enumerate(whole.chunk(self._size)):
                yield from self._pairs(piece, rank)
            return
        table, start = whole.view(self._size, self.length), 0
        for rows in self._even:
            count = rows[0].numel()
            yield table[:, start : start + count].unflatten(1, rows.shape[1:]), rows
            start += count

    def _pairs(self, piece: Tensor, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for rows in self._rows[rank]:
            yield piece[start : start + rows.numel()].view_as(rows), rows
            start += rows.numel()


def _part(rows: slice, bucket: Bucket) -> slice:
    """Part `bucket.part` of some rows."""
    count = rows.stop - rows.start
    return slice(
        rows.start + count * bucket.part // bucket.parts, rows.start + count * (bucket.part + 1) // bucket.parts
    )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in one: a view where there is but one."""
    return tensors[0].view(-1) if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write `flatten`'s result back; nothing to do for a view."""
    if len(tensors) > 1:
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(one) for part, one in zip(parts, tensors, strict=True)])
