"""Divisions of layers against all that there are."""

import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.planning.balance import Work, balance

TIMES = st.floats(0.1, 10)


def divisions(layers: int, stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(b - a for a, b in pairwise((0, *borders, layers)))
        for borders in combinations(range(1, layers), stages - 1)
    ]


@given(st.lists(TIMES, min_size=4, max_size=9), TIMES, TIMES, st.integers(1, 4))
def test_no_division_has_a_faster_slowest_stage(layers, first, last, stages) -> None:
    work = Work(tuple(layers), first, last)
    best = min(work.slowest(depths, stages) for depths in divisions(len(layers), stages))
    assert work.slowest(balance(work, stages), stages) == pytest.approx(best)


@given(st.lists(TIMES, min_size=5, max_size=8), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_limits_hold(layers, most) -> None:
    work = Work(tuple(layers))
    allowed = [d for d in divisions(len(layers), 3) if all(x <= y for x, y in zip(d, most, strict=True))]
    if not allowed:
        with pytest.raises(ConfigError, match="don't fit"):
            balance(work, 3, most=most)
        return
    found = balance(work, 3, most=most)
    assert found in allowed
    assert work.slowest(found, 3) == pytest.approx(min(work.slowest(d, 3) for d in allowed))


@given(st.lists(TIMES, min_size=6, max_size=9), st.sampled_from([(2, 2), (3, 2), (2, 3)]))
def test_several_stages_a_rank_come_close(layers, shape) -> None:
    """No move of one layer makes the slowest rank faster, and the best of all is near."""
    work, (ranks, chunks) = Work(tuple(layers), 0.5, 1.0), shape
    best = min(work.slowest(depths, ranks) for depths in divisions(len(layers), ranks * chunks))
    assert work.slowest(balance(work, ranks, chunks), ranks) <= (best + max(layers)) * (1 + 1e-12)


def test_equal_layers_are_spread_equally_and_heads_make_their_stages_shallower() -> None:
    assert balance(Work((1.0,) * 8), 4) == (2, 2, 2, 2)
    assert balance(Work((1.0,) * 10), 4) in {(2, 2, 3, 3), (2, 3, 2, 3)}, "early stages hold more microbatches"
    assert balance(Work((1.0,) * 8, last=2.0), 2) == (5, 3)
    assert balance(Work((1.0, 3.0, 1.0, 1.0, 1.0, 1.0)), 2) == (2, 4)


def test_too_few_layers_are_said() -> None:
    with pytest.raises(ConfigError, match="2 layers are too few for 4 stages"):
        balance(Work((1.0, 1.0)), 2, 2)


def test_large_models_take_milliseconds() -> None:
    work = Work(tuple(1.0 + (i % 20 == 0) for i in range(80)), 0.1, 2.0)
    begin = time.process_time()
    balance(work, 16)
    balance(work, 8, 4)
    assert time.process_time() - begin < 1.0
