"""What a check of the launched ranks finds: how fast each is, what lies between them, which layouts compute wrongly.

The report is made of plain values, the same on every rank, and is kept as JSON with these keys:

- `world_size`, `hosts` (by rank), `ranks_per_machine`, `backend`, `device`, `dtype` (of the layouts' steps), `torch`;
- `ranks`: by rank `flops_per_second` (a matrix product) and `memory_bytes_per_second` (a copy, read and write);
- `links`: a list of `names` (what of a layout these groups stand for: `tp=4`, `all ranks`, ...), `operation`
  (`all_reduce`, `all_gather`, `reduce_scatter`, `send_recv`) and `groups`: `ranks`, `bytes_per_second` (what each
  rank's link carries, see `parallel.measure`) and `latency_seconds`, as its slowest rank saw them;
- `layouts`: a list of `layout` (words), `rank`, `what` and `error`: who differs most from one process, in what, and by
  what share; `tolerance`: what share is allowed; `not_tried`: layouts for which time did not do;
- `slow`, `wrong`: sentences. A rank or group is slow that is slower than the median by more than `slow_share`.
"""

import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from megatron import faults
from megatron.checkpoint.together import Together
from megatron.config.run import RunConfig
from megatron.errors import ClusterError
from megatron.parallel.measure import Rate, groupings, measure_links, measure_speed, node_size
from megatron.parallel.mesh import Mesh
from megatron.train.selfcheck import (
    TOLERANCE,
    Difference,
    Layout,
    ToyStep,
    layouts,
    toy_config,
    toy_step,
    worst_difference,
)

SLOW_SHARE = 0.2


@dataclass(frozen=True)
class Group:
    """What an operation does in one group, as the slowest of its ranks sees it."""

    ranks: tuple[int, ...]
    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Link:
    """One operation in groups that were measured at the same time."""

    names: tuple[str, ...]
    operation: str
    groups: tuple[Group, ...]

    @property
    def slowest(self) -> Group:
        """The group with the lowest bandwidth."""
        return min(self.groups, key=lambda group: group.bytes_per_second)


@dataclass(frozen=True)
class Tried:
    """What a step in one layout came to: the rank and the number that are furthest off."""

    layout: str
    rank: int
    what: str
    error: float


@dataclass
class ClusterReport:
    """See the head of this module."""

    world_size: int
    hosts: list[str]
    ranks_per_machine: int
    backend: str
    device: str
    dtype: str
    torch: str
    tolerance: float
    slow_share: float = SLOW_SHARE
    ranks: list[dict[str, float]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    layouts: list[Tried] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def who(self, ranks: Sequence[int]) -> str:
        """Ranks and their hosts in words."""
        hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ({hosts})"

    def as_json(self) -> dict[str, object]:
        """Plain lists and dicts; an infinite error is null."""
        found = asdict(self)
        for tried in found["layouts"]:
            tried["error"] = tried["error"] if math.isfinite(tried["error"]) else None
        return found


class ClusterCheck:
    """Measures and tries everything, or what the time does for. Every rank makes one and calls `run`.

    mesh: all ranks along dp. seconds_left: until the check should have ended; the first rank's counts. begin: is told
    the name of each part, and how many there are in all, before it begins.
    """

    def __init__(
        self, mesh: Mesh, dtype: torch.dtype, seconds_left: Callable[[], float], begin: Callable[[str, int], None]
    ) -> None:
        self._mesh, self._dtype, self._seconds_left, self._begin = mesh, dtype, seconds_left, begin
        self._together, backend = Together.of(mesh), mesh.backend
        hosts = self._together.gather(platform.node())
        self.report = ClusterReport(
            world_size=mesh.world_size,
            hosts=hosts,
            ranks_per_machine=node_size(hosts),
            backend=backend.process_group,
            device=backend.name(),
            dtype=str(dtype).removeprefix("torch."),
            torch=torch.__version__,
            tolerance=TOLERANCE[dtype],
        )
        self._links = groupings(hosts)
        wanted = layouts(mesh.world_size, self.report.ranks_per_machine) if mesh.world_size > 1 else []
        stuck = [one for one in wanted if one.schedule == "interleaved"] if mesh.backend.has_one_queue else []
        self.report.not_tried += [f"{one.describe()} (not with CUDA_DEVICE_MAX_CONNECTIONS=1)" for one in stuck]
        self._layouts = [one for one in wanted if one not in stuck]

    def run(self) -> ClusterReport:
        """Everything, in turn. Raises ClusterError where this rank fails."""
        self._measure_ranks()
        self._measure_links(until=0.5 * self._together.lead(self._seconds_left))
        self._try_layouts()
        return self.report

    def _measure_ranks(self) -> None:
        with self._part("matrix products and copies"):
            self.report.ranks = [asdict(speed) for speed in self._together.gather(measure_speed(self._mesh.backend))]
        self.report.slow += slow_ranks(self.report)

    def _measure_links(self, until: float) -> None:
        for grouping in self._links:
            name = f"links of {grouping.names[0]}"
            if self._together.lead(self._seconds_left) < until:
                self.report.not_tried.append(name)
                continue
            with self._part(name):
                measured = self._together.gather(measure_links(self._mesh, grouping))
            self.report.links += by_operation(grouping.names, measured)
        self.report.slow += slow_groups(self.report)

    def _try_layouts(self) -> None:
        with self._part("a step in one process"):
            alone = self._step(Layout(), Mesh(self._mesh.backend))
            self.report.wrong += disagreements(self.report, self._together.gather(digest(alone)))
        for layout in self._layouts:
            if self._together.lead(self._seconds_left) < 0:
                self.report.not_tried.append(layout.describe())
                continue
            with self._part(f"a step with {layout.describe()}"):
                mesh = Mesh.build(self._config(layout).parallel, self._mesh.backend)
                faults.point("cluster.step")
                found = self._together.gather(worst_difference(self._step(layout, mesh), alone))
                mesh.release()
            self.report.layouts.append(_furthest(layout, found))
        self.report.wrong += wrong_layouts(self.report)

    def _step(self, layout: Layout, mesh: Mesh) -> ToyStep:
        return toy_step(self._config(layout), self._dtype, mesh)

    def _config(self, layout: Layout) -> RunConfig:
        return toy_config(self.report.world_size, self.report.ranks_per_machine, layout)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """A part of the check; what goes wrong on this rank alone is said with its name."""
        self._begin(name, 2 + len(self._links) + len(self._layouts))
        try:
            with self._mesh.noticing_loss():
                yield
        except (RuntimeError, ValueError, OSError) as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            who = self.report.who([self._mesh.world_rank])
            raise ClusterError(f"{who} failed at {name}: {reason}") from error


def by_operation(names: tuple[str, ...], measured: Sequence[tuple[tuple[int, ...], dict[str, Rate]]]) -> Iterator[Link]:
    """Rates of the groups' operations out of what each rank saw: (its group, rates by operation)."""
    seen: dict[str, dict[tuple[int, ...], list[Rate]]] = {}
    for ranks, rates in measured:
        for operation, rate in rates.items():
            seen.setdefault(operation, {}).setdefault(ranks, []).append(rate)
    for operation, groups in seen.items():
        yield Link(
            names,
            operation,
            tuple(
                Group(
                    ranks,
                    min(rate.bytes_per_second for rate in rates),
                    max(rate.latency_seconds for rate in rates),
                )
                for ranks, rates in groups.items()
            ),
        )


def slow_places(rates: Sequence[float]) -> list[int]:
    """Where a rate is below the median (of an even number, the upper one) by more than SLOW_SHARE."""
    limit = (1 - SLOW_SHARE) * statistics.median_high(rates)
    return [place for place, rate in enumerate(rates) if rate < limit]


def slow_ranks(report: ClusterReport) -> Iterator[str]:
    """A sentence for each slow rank and what it is slow at."""
    for kind, name in (("flops_per_second", "matrix products"), ("memory_bytes_per_second", "memory copies")):
        rates = [rank[kind] for rank in report.ranks]
        for place in slow_places(rates):
            share = rates[place] / statistics.median_high(rates)
            yield f"{report.who([place])} is slow: {name} at {share:.0%} of the median"


def slow_groups(report: ClusterReport) -> Iterator[str]:
    """A sentence for each slow group and what it is slow at."""
    for link in report.links:
        rates = [group.bytes_per_second for group in link.groups]
        for place in slow_places(rates):
            share = rates[place] / statistics.median_high(rates)
            who = report.who(link.groups[place].ranks)
            yield f"{who}: {link.operation} of {link.names[0]} at {share:.0%} of the median group"


def digest(step: ToyStep) -> dict[str, float]:
    """A step in one process as a few numbers, by which ranks can be held against each other."""
    norms = {f"gradient of {name}": float(part.view.double().norm()) for name, part in step.gradients.items()}
    return {"gradient norm": step.grad_norm, **{f"loss of head {k}": v for k, v in step.losses.items()}, **norms}


def disagreements(report: ClusterReport, digests: Sequence[dict[str, float]]) -> Iterator[str]:
    """A sentence for each rank that computes another step in one process than most do."""
    floor = 1e-3 * statistics.median_high([found["gradient norm"] for found in digests])
    for rank, found in enumerate(digests):
        errors = []
        for what, value in found.items():
            middle = statistics.median_high([other[what] for other in digests])
            error = abs(value - middle) / max(abs(middle), floor)
            errors.append((error if math.isfinite(error) else math.inf, what))
        error, what = max(errors)
        if error > report.tolerance:
            yield f"{report.who([rank])} computes another step alone than most ranks do: {what} is off by {error:.1e}"


def wrong_layouts(report: ClusterReport) -> Iterator[str]:
    """A sentence for each layout whose step is not that of one process."""
    for tried in report.layouts:
        if tried.error > report.tolerance:
            who = report.who([tried.rank])
            yield f"a step with {tried.layout} is wrong: {tried.what} is off by {tried.error:.1e} on {who}"


def _furthest(layout: Layout, found: Sequence[Difference]) -> Tried:
    rank = max(range(len(found)), key=lambda place: found[place].error)
    return Tried(layout.describe(), rank, found[rank].what, found[rank].error)
