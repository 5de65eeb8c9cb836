"""How fast the ranks are and what lies between them: matrix products, memory copies, collectives of groups of ranks.

Bandwidths are what each rank's link carries ("bus bandwidth"): of n ranks that reduce b bytes in t seconds
2 (n - 1) / n b / t; that gather or scatter b bytes in all, (n - 1) / n b / t; of a message of b bytes, b / t.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.distributed as dist

from megatron import faults
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import all_gather, reduce_scatter

_ROUNDS = 3  # of which the fastest counts: what disturbs makes slower only
_MESSAGE = {"cpu": 1 << 23, "cuda": 1 << 27}  # bytes; large enough that latency doesn't count
_REPEATS = {"cpu": 2, "cuda": 10}


@dataclass(frozen=True)
class Grouping:
    """Groups of ranks, none in two, that are measured at the same time; names: what of a layout they stand for."""

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rate:
    """Of one operation in one group: bandwidth as above, and seconds that a message of some bytes takes."""

    bytes_per_second: float
    latency_seconds: float


def node_size(hosts: Sequence[str]) -> int:
    """The largest number of consecutive ranks, cut from rank 0 on, that are always of one host. hosts: by rank."""
    return math.gcd(*(len(list(run)) for _, run in groupby(hosts)))


def groupings(hosts: Sequence[str]) -> list[Grouping]:
    """What is worth measuring: blocks inside a machine (tp), neighbours at either distance (pp), across machines (dp),
    all ranks. hosts: by rank."""
    world, node = len(hosts), node_size(hosts)
    found: dict[tuple[tuple[int, ...], ...], list[str]] = {}

    def add(name: str, groups: list[tuple[int, ...]]) -> None:
        if groups:
            found.setdefault(tuple(groups), []).append(name)

    for size in range(2, node + 1):
        if node % size == 0:
            add(f"tp={size}", [tuple(range(first, first + size)) for first in range(0, world, size)])
    for distance in sorted({1, node}):
        for turn, which in enumerate(("even", "odd")):
            firsts = [rank for rank in range(world - distance) if rank // distance % 2 == turn]
            add(f"pp neighbours, {distance} apart, {which}", [(rank, rank + distance) for rank in firsts])
    if 1 < node < world:
        add("dp across machines", [tuple(range(place, world, node)) for place in range(node)])
    if world > 1:
        add("all ranks", [tuple(range(world))])
    return [Grouping(tuple(names), groups) for groups, names in found.items()]


def measure_links(mesh: Mesh, grouping: Grouping) -> tuple[tuple[int, ...], dict[str, Rate]]:
    """This rank's group and the rates of its operations as this rank sees them; empty for a rank in none.

    mesh: all ranks along dp. Every rank must call this.
    """
    spare = replace(mesh, made=[])
    mine: tuple[tuple[int, ...], dist.ProcessGroup] | None = None
    for ranks in grouping.groups:
        group = spare.subgroup("dp", ranks)
        mine = (ranks, group) if group is not None else mine
    rates = {} if mine is None else _rates(mesh, *mine)
    spare.release()
    return (() if mine is None else mine[0]), rates


def _rates(mesh: Mesh, ranks: tuple[int, ...], group: dist.ProcessGroup) -> dict[str, Rate]:
    count, backend = len(ranks), mesh.backend
    message = _MESSAGE[backend.device.type]
    operations = {
        "all_reduce": (_reduce, 2 * (count - 1) / count),
        "all_gather": (_gather, (count - 1) / count),
        "reduce_scatter": (_scatter, (count - 1) / count),
    }
    if count == 2:
        operations["send_recv"] = (_ping_pong, 2.0)
    rates = {}
    for name, (make, factor) in operations.items():
        trips = 2 if name == "send_recv" else 1
        small = _seconds(backend, make(mesh, ranks, group, 64 * count), 5 * _REPEATS[backend.device.type])
        large = _seconds(backend, make(mesh, ranks, group, message), _REPEATS[backend.device.type])
        rates[name] = Rate(factor * message / large, small / trips)
    return rates


def _reduce(mesh: Mesh, _ranks: Sequence[int], group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    values = torch.zeros(size // 4, device=mesh.backend.device)
    return lambda: dist.all_reduce(values, group=group)


def _gather(mesh: Mesh, ranks: Sequence[int], group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    part = torch.zeros(size // 4 // len(ranks), device=mesh.backend.device)
    whole = part.new_empty(len(ranks) * part.numel())
    return lambda: all_gather(whole, part, group=group)


def _scatter(mesh: Mesh, ranks: Sequence[int], group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    part = torch.zeros(size // 4 // len(ranks), device=mesh.backend.device)
    whole = part.new_zeros(len(ranks) * part.numel())
    return lambda: reduce_scatter(part, whole, group=group)


def _ping_pong(mesh: Mesh, ranks: Sequence[int], group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    values = torch.zeros(size // 4, device=mesh.backend.device)
    first = mesh.world_rank == ranks[0]
    other = ranks[1] if first else ranks[0]

    def trip() -> None:
        for sends in (first, not first):
            if sends:
                dist.send(values, other, group=group)
            else:
                dist.recv(values, other, group=group)

    return trip


@dataclass(frozen=True)
class Speed:
    """Of one rank: floating-point operations in a large matrix product, and bytes read and written by a copy."""

    flops_per_second: float
    memory_bytes_per_second: float


def measure_speed(backend: Backend) -> Speed:
    """Of this rank; where all measure at once they share what they share in training, too."""
    side, size = (8192, 1 << 30) if backend.is_cuda else (768, 1 << 26)
    dtype = torch.bfloat16 if backend.is_cuda else torch.float32
    matrix = torch.randn(side, side, device=backend.device).to(dtype)
    product = torch.empty_like(matrix)
    source = torch.zeros(size // 4, device=backend.device)
    target = torch.empty_like(source)

    def multiply() -> None:
        faults.point("measure.multiply")
        torch.mm(matrix, matrix, out=product)

    repeats = 5 * _REPEATS[backend.device.type]
    return Speed(
        flops_per_second=2 * side**3 / _seconds(backend, multiply, repeats),
        memory_bytes_per_second=2 * size / _seconds(backend, lambda: target.copy_(source), repeats),
    )


def _seconds(backend: Backend, work: Callable[[], object], repeats: int) -> float:
    """Of one repeat, in the fastest round; the first repeats, in which memory and connections are made, don't count."""
    work(), work()
    best = math.inf
    for _ in range(_ROUNDS):
        backend.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        backend.synchronize()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best
