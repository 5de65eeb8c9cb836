"""Makes each rank's accumulated gradients those of the whole step, and counts every parameter once in their norm.

Sums over data-parallel ranks (the mean is taken where losses are weighed) begin as soon as a bucket's gradients are
whole: while the last backward pass of a stage goes on (`watch`), and after the action that the schedule names
(`reduce`). `finish` does what is left: parameters of which each tp rank saw but a part of the uses are summed over tp
first, copies on several stages over these last, so that all copies' gradients are the same to the bit.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.optim.buckets import BUCKET, Bucket, Segments, flatten, make_buckets, own_rows, unflatten
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import all_gather, reduce_scatter

_MOST_FLYING = 2  # messages under way at a time: what they hold beside the gradients is bounded

Home = tuple[int, bool]  # the stage whose actions make a gradient, and whether its heads alone do


@dataclass(frozen=True)
class Shared:
    """What the ranks of a mesh have in common of one rank's parameters, by name.

    partial: whole on each tp rank, gradients to be summed over tp. cut: of which each tp rank holds a part. copies:
    (group, names) of parameters that other pipeline stages hold, too; foreign: those of them that another stage owns.
    home: of the parameters that one stage alone uses.
    """

    partial: frozenset[str] = frozenset()
    cut: frozenset[str] = frozenset()
    copies: Sequence[tuple[dist.ProcessGroup, tuple[str, ...]]] = ()
    foreign: frozenset[str] = frozenset()
    home: Mapping[str, Home] = field(default_factory=dict)

    def counted(self, parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> dict[str, nn.Parameter]:
        """Those that this rank counts, so that all ranks of a data-parallel one count each parameter once."""
        first = mesh.rank("tp") == 0
        return {
            name: parameter
            for name, parameter in parameters.items()
            if name not in self.foreign and (first or name in self.cut)
        }


class GradientSync:
    """Sums of gradients over the ranks of a mesh; does nothing where there is one.

    sharded: each data-parallel rank gets the sums of its rows alone (ZeRO-1, arXiv 1910.02054), and hands out the
    parameters' rows after it has updated them. Parameters must have their `main_grad` when buckets are made.
    """

    def __init__(
        self, mesh: Mesh, parameters: Mapping[str, nn.Parameter], shared: Shared, sharded: bool = False
    ) -> None:
        self._mesh, self._parameters, self._shared = mesh, parameters, shared
        self._counted = shared.counted(parameters, mesh)
        self.sharded = sharded and mesh.size("dp") > 1
        self._buckets: dict[Home, tuple[Bucket, ...]] = {}
        self._late: tuple[Bucket, ...] = ()
        self._begun: dict[Home, int] = {}
        self._flying: deque[tuple[dist.Work, Callable[[], None]]] = deque()
        self._watched: int | None = None
        self._missing: set[str] = set()

    @property
    def overlaps(self) -> bool:
        """Whether there are sums to begin before the last action."""
        return self._mesh.size("dp") > 1

    def make_buckets(self, most: int = BUCKET) -> None:
        """Decide which gradients travel together, at most so many elements; those made first go first."""
        homes: dict[Home | None, list[str]] = {}
        for name in reversed(list(self._parameters)):
            home = None if name in self._shared.partial else self._shared.home.get(name)
            homes.setdefault(home, []).append(name)
        made = {home: make_buckets(self._parameters, names, self.sharded, most) for home, names in homes.items()}
        self._late = made.pop(None, ())
        self._buckets = made
        self._begun = dict.fromkeys(made, 0)

    def count_buckets(self, heads_only: bool) -> dict[int, int]:
        """Buckets of each stage's layers, or of its heads, to be reduced by the schedule; numbered heads last."""
        if not self.overlaps:
            return {}
        return {stage: len(buckets) for (stage, heads), buckets in self._buckets.items() if heads is heads_only}

    def own(self, tensor: Tensor) -> Tensor:
        """The rows of a parameter, or of its gradient, that this rank updates: all where nothing is sharded."""
        return tensor[own_rows(tensor, self._mesh)] if self.sharded else tensor

    def first_row(self, parameter: Tensor) -> int:
        """Where `own` begins."""
        return own_rows(parameter, self._mesh).start if self.sharded else 0

    def watch(self, stage: int) -> None:
        """The stage's last backward pass begins: its buckets may go as soon as `made` has named all of one."""
        self._watched = stage
        self._missing = {name for bucket in self._buckets.get((stage, False), ()) for name in bucket.names}

    def made(self, name: str) -> None:
        """A backward pass has added to the gradient of a parameter."""
        if name not in self._missing:
            return
        self._missing.discard(name)
        home = (self._watched, False)
        buckets = self._buckets[home]
        while self._begun[home] < len(buckets) and self._missing.isdisjoint(buckets[self._begun[home]].names):
            self._begin_next(home)

    def reduce(self, stage: int, number: int) -> None:
        """R: begin to sum a bucket of a stage, and those before it, unless they are under way."""
        layers = len(self._buckets.get((stage, False), ()))
        home, place = ((stage, False), number) if number < layers else ((stage, True), number - layers)
        while self._begun[home] <= place:
            self._begin_next(home)

    def finish(self) -> None:
        """Sum what isn't yet, and wait for all; gradients are whole afterwards. Every rank must call this."""
        shared, names = self._shared, self._parameters.keys()
        _sum(self._grads(name for name in names if name in shared.partial), self._mesh.group("tp"))
        if self.overlaps:
            for home, buckets in self._buckets.items():
                while self._begun[home] < len(buckets):
                    self._begin_next(home)
            for bucket in self._late:
                self._begin(bucket)
            self._land(0)
        self._begun = dict.fromkeys(self._begun, 0)
        self._watched, self._missing = None, set()
        for group, copied in shared.copies:
            for grad in self._grads(name for name in copied if name in names):
                _sum([self.own(grad)], group)

    def hand_out(self) -> None:
        """Give every data-parallel rank the rows that the others have updated. Every rank must call this."""
        if not self.sharded:
            return
        for bucket in (*(bucket for buckets in self._buckets.values() for bucket in buckets), *self._late):
            segments = Segments(bucket, [self._parameters[name].detach() for name in bucket.names], self._mesh)
            mine = segments.gather(self._mesh.rank("dp"))
            whole = mine.new_empty(self._mesh.size("dp") * segments.length)
            work = all_gather(whole, mine, group=self._mesh.group("dp"), async_op=True)
            self._flying.append((work, partial(segments.scatter_all, whole)))
            self._land(_MOST_FLYING)
        self._land(0)

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

    def _begin_next(self, home: Home) -> None:
        self._begin(self._buckets[home][self._begun[home]])
        self._begun[home] += 1

    def _begin(self, bucket: Bucket) -> None:
        """Send a bucket's gradients on their way."""
        grads, group = self._grads(bucket.names), self._mesh.group("dp")
        if self.sharded:
            segments, rank = Segments(bucket, grads, self._mesh), self._mesh.rank("dp")
            mine = grads[0].new_empty(segments.length)
            work = reduce_scatter(mine, segments.gather_all(), group=group, async_op=True)
            self._flying.append((work, lambda: segments.scatter(mine, rank)))
        else:
            flat = flatten(grads)
            work = dist.all_reduce(flat, group=group, async_op=True)
            self._flying.append((work, lambda: unflatten(flat, grads)))
        self._land(_MOST_FLYING)

    def _land(self, most: int) -> None:
        """Wait, oldest first, until at most so many messages are under way."""
        while len(self._flying) > most:
            work, then = self._flying.popleft()
            work.wait()
            then()


def _sum(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum over a group in place, in one message."""
    if group is not None and tensors:
        flat = flatten(tensors)
        dist.all_reduce(flat, group=group)
        unflatten(flat, tensors)
