"""The mesh of ranks as a value: axes pp, dp, tp, asked by name, built once and passed down.

Rank order is Megatron's: tp fastest, then dp, then pp. Only this module talks to torchrun's environment and makes
process groups; everyone else is handed a `Mesh` and asks it.
"""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError, RankLostError
from megatron.parallel.backend import Backend
from megatron.parallel.presence import Presence
from megatron.parallel.rendezvous import meet

AXES = ("pp", "dp", "tp")  # slowest first

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Sizes and this rank's coordinates along the axes pp, dp, tp, and the backend they run on.

    A mesh of one rank has no process groups: `group` is None, and nobody communicates. presence: who of the processes
    that torchrun started is still there. made: all groups that it made and this rank is in.
    """

    backend: Backend
    sizes: tuple[int, int, int] = (1, 1, 1)
    ranks: tuple[int, int, int] = (0, 0, 0)
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict, compare=False, repr=False)
    timeout: timedelta | None = None
    presence: Presence | None = field(default=None, compare=False, repr=False)
    made: list[dist.ProcessGroup] = field(default_factory=list, compare=False, repr=False)

    @staticmethod
    def build(config: ParallelConfig, backend: Backend) -> "Mesh":
        """Make the mesh of this process and the others that torchrun launched, joining them first where need be.

        Every rank must call this, with the same sizes. Raises ConfigError where they don't fit the number of ranks.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        sizes = mesh_sizes(config, world)
        if world == 1:
            return Mesh(backend)
        presence = None if dist.is_initialized() else _join(config, backend)
        place = _place(dist.get_rank(), sizes)
        mesh = Mesh(backend, sizes, place, timeout=_timeout(config), presence=presence)
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
        with self._meeting():
            for members in _lines(self.sizes, axis):
                chosen = [members[coordinate] for coordinate in coordinates]
                group = dist.new_group(chosen, timeout=self.timeout) if len(chosen) > 1 else None
                if self.world_rank in chosen:
                    mine = group
        self.made.extend([] if mine is None else [mine])
        return mine

    def everyone(self) -> dist.ProcessGroup | None:
        """A new gloo group of all ranks, for what must not meet the run's own messages; None for one rank alone."""
        if self.world_size == 1:
            return None
        with self._meeting():
            self.made.append(dist.new_group(backend="gloo", timeout=self.timeout))
        return self.made[-1]

    def largest(self, *values: int) -> list[int]:
        """Of each of the values the largest that a rank has; one message for all of them."""
        if self.world_size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64, device=self.backend.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def place(self, rank: int | None = None) -> str:
        """Coordinates of a rank, this process's unless one is given, in words, for messages."""
        return _words(self.ranks if rank is None else _place(rank, self.sizes))

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

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Raise RankLostError, which says who is gone, where a rank within the block waits in vain for another."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
                raise
            reason = text.strip().splitlines()[0][:300]
            raise RankLostError(f"{self._who_is_lost()} (in {_waiting_in(error)}: {reason})") from error

    def _who_is_lost(self) -> str:
        """Whom this rank waits for in vain, in words."""
        me = f"rank {self.world_rank} ({self.place()})"
        try:
            lost = self.presence.lost() if self.presence else None
        except RuntimeError:  # the store that they shared has gone, too
            lost = None
        if lost == []:
            return (
                f"{me} waited for another one for longer than --distributed-timeout-minutes, though all are alive: "
                "raise it if a step, a save or an evaluation may take that long"
            )
        named = [f"rank {rank} ({self.place(rank)}{self._direction(rank)})" for rank in lost or ()]
        whom = ", ".join(named) or "another one"
        return (
            f"{me} lost contact with {whom}, which died, was stopped or can't be reached any more; "
            "messages of its own, if any, say why"
        )

    def _direction(self, rank: int) -> str:
        """The axis along which a rank is this one's peer, in words; nothing where it is none."""
        differing = [a for a, mine, other in zip(AXES, self.ranks, _place(rank, self.sizes), strict=True)
                     if mine != other]  # fmt: skip
        return f", its peer along {differing[0]}" if len(differing) == 1 else ""

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Make groups within the block once all ranks are here: inside torch nobody hears of one that is gone."""
        if self.presence is not None:
            self.presence.meet()
        with self.noticing_loss():
            yield

    def release(self) -> None:
        """Give back the groups that this mesh has made, but stay joined: another mesh may follow."""
        while self.made:
            dist.destroy_process_group(self.made.pop())

    def close(self) -> None:
        """Leave the process groups; the mesh is of no use afterwards."""
        if self.presence is not None:
            self.presence.leave()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ONE_RANK = Mesh(Backend(torch.device("cpu"), "gloo"))


def launched_rank() -> int:
    """This process's number among those that torchrun launched; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def leads_node() -> bool:
    """Whether this process is the first of those that torchrun launched on this node; True without it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launched_size() -> int | None:
    """How many processes torchrun launched, or was said to; None without it."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size else None


def mesh_sizes(config: ParallelConfig, world: int) -> tuple[int, int, int]:
    """(pp, dp, tp) for `world` ranks; dp is what tp and pp leave. Raises ConfigError where they don't fit."""
    tp, pp = config.tensor_model_parallel_size, config.pipeline_ranks
    if world % (tp * pp):
        raise ConfigError(
            f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp} does not divide the "
            f"{world} process{'es' if world > 1 else ''} launched: start {tp * pp} (or a multiple) with "
            f"torchrun --nproc-per-node, or lower the sizes"
        )
    return pp, world // (tp * pp), tp


def _waiting_in(error: Exception) -> str:
    """The innermost function of this package that an error passed."""
    package = os.path.dirname(os.path.dirname(__file__))
    calls = [call for call in traceback.extract_tb(error.__traceback__) if call.filename.startswith(package)]
    return f"{calls[-1].name} of {os.path.relpath(calls[-1].filename, package)}"


def _timeout(config: ParallelConfig) -> timedelta:
    return timedelta(minutes=config.distributed_timeout_minutes)


def _place(rank: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    _, dp, tp = sizes
    return rank // (dp * tp), rank // tp % dp, rank % tp


def _join(config: ParallelConfig, backend: Backend) -> Presence:
    timeout = _timeout(config)
    kinds = f"cpu:gloo,cuda:{backend.process_group}" if backend.is_cuda else backend.process_group
    try:
        store, rank, size = meet(timeout)
    except ValueError as error:  # an environment that torchrun did not make
        raise ConfigError(f"WORLD_SIZE asks for several processes, but {error}: start them with torchrun") from error
    except TimeoutError as error:
        raise RankLostError(f"the processes of this run did not meet: {error}") from error
    presence = Presence(store, rank, size, timeout)
    # Without device_id nccl makes a group's communicator at its first use, by its members alone: there are many groups.
    dist.init_process_group(kinds, store=store, rank=rank, world_size=size, timeout=timeout)
    return presence


def _lines(sizes: Sequence[int], axis: str) -> list[list[int]]:
    """The world ranks of every line along `axis`; the same list on every rank."""
    grid = torch.arange(sizes[0] * sizes[1] * sizes[2]).view(*sizes)
    return grid.movedim(AXES.index(axis), -1).flatten(0, 1).tolist()


def _rank_at(place: Sequence[int], sizes: Sequence[int]) -> int:
    return (place[0] * sizes[1] + place[1]) * sizes[2] + place[2]


def _words(numbers: Sequence[int]) -> str:
    by_axis = dict(zip(AXES, numbers, strict=True))
    return " ".join(f"{axis}={by_axis[axis]}" for axis in ("dp", "pp", "tp"))
