"""The mesh of ranks as a value: axes pp, dp, tp, asked by name, built once and passed down.

Rank order is Megatron's: tp fastest, then dp, then pp. Only this module talks to torchrun's environment and makes
process groups; everyone else is handed a `Mesh` and asks it.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError, RankLostError
from megatron.parallel.backend import Backend
from megatron.parallel.rendezvous import meet

AXES = ("pp", "dp", "tp")  # slowest first

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Sizes and this rank's coordinates along the axes pp, dp, tp, and the backend they run on.

    A mesh of one rank has no process groups: `group` is None, and nobody communicates.
    """

    backend: Backend
    sizes: tuple[int, int, int] = (1, 1, 1)
    ranks: tuple[int, int, int] = (0, 0, 0)
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict, compare=False, repr=False)
    timeout: timedelta | None = None

    @staticmethod
    def build(config: ParallelConfig, backend: Backend) -> "Mesh":
        """Make the mesh of this process and the others that torchrun launched, joining them first where need be.

        Every rank must call this, with the same sizes. Raises ConfigError where they don't fit the number of ranks.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        sizes = mesh_sizes(config, world)
        if world == 1:
            return Mesh(backend)
        if not dist.is_initialized():
            _join(config, backend)
        mesh = Mesh(backend, sizes, _place(dist.get_rank(), sizes), timeout=_timeout(config))
        groups = {axis: mesh.subgroup(axis, range(mesh.size(axis))) for axis in AXES if mesh.size(axis) > 1}
        return replace(mesh, groups=groups)

    def size(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.sizes[AXES.index(axis)]

    def rank(self, axis: str) -> int:
        """This process's coordinate along `axis`."""
        return self.ranks[AXES.index(axis)]

    @property
    def world_size(self) -> int:
        """Number of ranks in all."""
        return self.sizes[0] * self.sizes[1] * self.sizes[2]

    @property
    def world_rank(self) -> int:
        """This process's rank among all."""
        return _rank_at(self.ranks, self.sizes)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in `axis` alone; None where there are no others."""
        return self.groups.get(axis)

    def peer(self, axis: str, coordinate: int) -> int:
        """World rank of the one at `coordinate` along `axis` that is like this one otherwise."""
        place = list(self.ranks)
        place[AXES.index(axis)] = coordinate
        return _rank_at(place, self.sizes)

    def subgroup(self, axis: str, coordinates: Sequence[int]) -> dist.ProcessGroup | None:
        """The ranks at `coordinates` of `axis` that are like this one otherwise; None for a rank not among them.

        Every rank of the mesh must call this, in the same order.
        """
        mine = None
        for members in _lines(self.sizes, axis):
            chosen = [members[coordinate] for coordinate in coordinates]
            group = dist.new_group(chosen, timeout=self.timeout) if len(chosen) > 1 else None
            if self.world_rank in chosen:
                mine = group
        return mine

    def everyone(self) -> dist.ProcessGroup | None:
        """A new gloo group of all ranks, for what must not meet the run's own messages; None for one rank alone."""
        return dist.new_group(backend="gloo", timeout=self.timeout) if self.world_size > 1 else None

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.world_size == 1:
            return value
        found = torch.tensor(value, device=self.backend.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def place(self) -> str:
        """This process's coordinates in words, for messages."""
        return _words(self.ranks)

    def describe(self) -> str:
        """The sizes in words, for messages."""
        return _words(self.sizes)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes logs."""
        return self.ranks == (0, 0, 0)

    def sum(self, values: torch.Tensor, axis: str | None = None) -> torch.Tensor:
        """Sum of `values` over all ranks, or those along `axis`, in place."""
        if (self.world_size if axis is None else self.size(axis)) > 1:
            dist.all_reduce(values, group=None if axis is None else self.group(axis))
        return values

    def broadcast(self, values: torch.Tensor, axis: str, source: int) -> torch.Tensor:
        """The values of the rank at coordinate `source` along `axis`, written into those of the others."""
        if self.size(axis) > 1:
            dist.broadcast(values, self.peer(axis, source), group=self.group(axis))
        return values

    def wait_for_main(self, work: Callable[[], T]) -> T:
        """`work` done by the main rank first, then by the others: for what the first leaves on disk for the rest."""
        if self.world_size == 1:
            return work()
        done = work() if self.is_main else None
        dist.barrier()
        return done if self.is_main else work()

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Raise RankLostError where a rank within the block waits in vain for another."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
                raise
            reason = text.strip().splitlines()[0][:300]
            raise RankLostError(
                f"rank {self.world_rank} ({self.place()}) lost contact with another one, which died or took longer "
                f"than --distributed-timeout-minutes; its own messages say why ({reason})"
            ) from error

    def close(self) -> None:
        """Leave the process groups; the mesh is of no use afterwards."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ONE_RANK = Mesh(Backend(torch.device("cpu"), "gloo"))


def launched_rank() -> int:
    """This process's number among those that torchrun launched; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int | None:
    """How many processes torchrun launched, or was said to; None without it."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size else None


def mesh_sizes(config: ParallelConfig, world: int) -> tuple[int, int, int]:
    """(pp, dp, tp) for `world` ranks; dp is what tp and pp leave. Raises ConfigError where they don't fit."""
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if world % (tp * pp):
        raise ConfigError(
            f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp} does not divide the "
            f"{world} process{'es' if world > 1 else ''} launched: start {tp * pp} (or a multiple) with "
            f"torchrun --nproc-per-node, or lower the sizes"
        )
    return pp, world // (tp * pp), tp


def _timeout(config: ParallelConfig) -> timedelta:
    return timedelta(minutes=config.distributed_timeout_minutes)


def _place(rank: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    _, dp, tp = sizes
    return rank // (dp * tp), rank // tp % dp, rank % tp


def _join(config: ParallelConfig, backend: Backend) -> None:
    timeout = _timeout(config)
    kinds = f"cpu:gloo,cuda:{backend.process_group}" if backend.is_cuda else backend.process_group
    device = backend.device if backend.is_cuda else None
    try:
        store, rank, size = meet(timeout)
    except ValueError as error:  # an environment that torchrun did not make
        raise ConfigError(f"WORLD_SIZE asks for several processes, but {error}: start them with torchrun") from error
    except TimeoutError as error:
        raise RankLostError(f"the processes of this run did not meet: {error}") from error
    dist.init_process_group(kinds, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)


def _lines(sizes: Sequence[int], axis: str) -> list[list[int]]:
    """The world ranks of every line along `axis`; the same list on every rank."""
    grid = torch.arange(sizes[0] * sizes[1] * sizes[2]).view(*sizes)
    return grid.movedim(AXES.index(axis), -1).flatten(0, 1).tolist()


def _rank_at(place: Sequence[int], sizes: Sequence[int]) -> int:
    return (place[0] * sizes[1] + place[1]) * sizes[2] + place[2]


def _words(numbers: Sequence[int]) -> str:
    by_axis = dict(zip(AXES, numbers, strict=True))
    return " ".join(f"{axis}={by_axis[axis]}" for axis in ("dp", "pp", "tp"))
