"""Layers over pipeline stages, so that the slowest rank is as fast as can be. No torch.

The work of a span is the sum over its layers, with the exits that tap them, plus what the first and the last stage do
besides. For one stage a rank the answer is exact: parametric search over the slowest stage's work, each step a greedy
pass. For several it is a local search from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron.errors import ConfigError

STEPS = 40  # of halving: the interval is then a trillionth


@dataclass(frozen=True)
class Work:
    """Time of each layer with its exits, and of what the first and the last stage do besides."""

    layers: tuple[float, ...]
    first: float = 0.0
    last: float = 0.0

    def spans(self, depths: Sequence[int]) -> list[float]:
        """The work of stages of so many layers."""
        sums = [0.0, *accumulate(self.layers)]
        borders = [0, *accumulate(depths)]
        found = [sums[b] - sums[a] for a, b in pairwise(borders)]
        found[0] += self.first
        found[-1] += self.last
        return found

    def slowest(self, depths: Sequence[int], ranks: int) -> float:
        """The work of the rank with the most; stage s lies on rank s mod `ranks`."""
        spans = self.spans(depths)
        return max(sum(spans[rank::ranks]) for rank in range(ranks))


def balance(work: Work, ranks: int, chunks: int = 1, most: Sequence[int] | None = None) -> tuple[int, ...]:
    """Layers of each of `ranks * chunks` stages. most: how many layers each stage may have (its memory).

    Every stage has one at least. Raises ConfigError where there are too few layers, or too many for `most`.
    """
    stages, count = ranks * chunks, len(work.layers)
    limits = list(most) if most is not None else [count] * stages
    if count < stages:
        raise ConfigError(f"{count} layers are too few for {stages} stages: take fewer pipeline ranks or chunks")
    if min(limits) < 1 or sum(limits) < count:
        raise ConfigError(f"{count} layers don't fit into {stages} stages of at most {tuple(limits)} layers")
    total = sum(work.layers) + work.first + work.last
    low, high = total / stages * (1 - 1e-9), total
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _starts(work, stages, limits, middle) else (middle, high)
    depths = _even(work, _starts(work, stages, limits, high), limits, high)
    return depths if chunks == 1 else _improve(work, depths, ranks, limits)


def _starts(work: Work, stages: int, limits: Sequence[int], bound: float) -> list[int] | None:
    """For each stage the first layer from which it and those after it can hold the rest, none above `bound`.

    None where not all layers fit.
    """
    bound *= 1 + 1e-12  # sums in another order
    start, starts = len(work.layers), [len(work.layers)]
    for stage in reversed(range(stages)):
        load = (work.last if stage == stages - 1 else 0.0) + (work.first if stage == 0 else 0.0)
        end, floor = start, stage  # every stage below needs a layer
        while start > floor and end - start < limits[stage] and load + work.layers[start - 1] <= bound:
            start -= 1
            load += work.layers[start]
        if start == end or load > bound:
            return None
        starts.append(start)
    return starts[::-1] if start == 0 else None


def _even(work: Work, starts: list[int], limits: Sequence[int], bound: float) -> tuple[int, ...]:
    """Among the divisions within `bound` one whose stages take about equal work, early ones no more than later ones."""
    stages, depths, at = len(limits), [], 0
    remaining = sum(work.layers) + work.first + work.last
    for stage in range(stages - 1):
        load, target = work.first if stage == 0 else 0.0, remaining / (stages - stage)
        end = at
        while end < len(work.layers) - (stages - 1 - stage) and end - at < limits[stage]:
            more = load + work.layers[end]
            needed = end < max(starts[stage + 1], at + 1)
            if not needed and (more > bound or more > target):
                break
            load, end = more, end + 1
        depths.append(end - at)
        remaining -= load
        at = end
    return (*depths, len(work.layers) - at)


def _improve(work: Work, depths: tuple[int, ...], ranks: int, limits: Sequence[int]) -> tuple[int, ...]:
    """Move single layers off the slowest rank as long as it, then the sum of squares, gets less."""

    def loads(found: Sequence[int]) -> list[float]:
        spans = work.spans(found)
        return [sum(spans[rank::ranks]) for rank in range(ranks)]

    def score(found: list[float]) -> tuple[float, float]:
        return max(found), sum(load * load for load in found)

    best, now = depths, loads(depths)
    while True:
        least, moved, slowest = score(now), None, now.index(max(now))
        for source in range(slowest, len(depths), ranks):
            for target in range(len(depths)):
                if target % ranks == slowest or best[source] == 1 or best[target] == limits[target]:
                    continue
                tried = list(best)
                tried[source] -= 1
                tried[target] += 1
                found = score(loads(tried))
                if found[0] <= least[0] and found[1] < least[1] * (1 - 1e-12):
                    moved, least = tuple(tried), found
        if moved is None:
            return best
        best, now = moved, loads(moved)
