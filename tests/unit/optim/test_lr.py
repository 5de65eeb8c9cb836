"""Learning-rate and weight-decay schedules: the values at the corners, the shapes between, and that they are pure."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.optim.lr import LrSchedule, WeightDecaySchedule

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSD_STYLES = ["linear", "cosine", "exponential", "minus_sqrt"]


def schedule(**changes) -> LrSchedule:
    return LrSchedule(**{"max_lr": 1.0, "min_lr": 0.1, "style": "linear", "decay_samples": 1000, **changes})


@pytest.mark.parametrize("style", STYLES)
def test_warmup_is_linear_from_its_initial_value(style):
    lr = schedule(style=style, warmup_samples=100, init_lr=0.2, wsd_decay_samples=100)
    assert lr.at(0) == 0.2
    assert lr.at(25) == pytest.approx(0.4)
    assert lr.at(100) == 1.0


def test_without_warmup_the_first_step_has_the_peak():
    assert schedule().at(0) == 1.0


@pytest.mark.parametrize(
    ("style", "at", "expected"),
    [
        ("constant", 550, 1.0),
        ("constant", 5000, 1.0),
        ("linear", 550, 0.1 + 0.9 * 0.5),
        ("linear", 1000, 0.1),
        ("cosine", 550, 0.1 + 0.9 * 0.5),
        ("cosine", 325, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 1000, 0.1),
        ("inverse-square-root", 400, 0.5),
        ("inverse-square-root", 900, 1 / 3),
    ],
)
def test_values_after_a_warmup_of_100(style, at, expected):
    assert schedule(style=style, warmup_samples=100).at(at) == pytest.approx(expected)


def test_inverse_square_root_stops_at_the_minimum():
    lr = schedule(style="inverse-square-root", warmup_samples=1, min_lr=0.5)
    assert lr.at(900) == 0.5


@pytest.mark.parametrize("style", ["linear", "cosine", "inverse-square-root", "WSD"])
def test_beyond_the_decay_it_stays_at_the_minimum(style):
    assert schedule(style=style, wsd_decay_samples=100).at(1001) == 0.1


@pytest.mark.parametrize(
    ("wsd_style", "halfway"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_wsd_is_stable_then_decays(wsd_style, halfway):
    lr = schedule(style="WSD", wsd_style=wsd_style, warmup_samples=100, wsd_decay_samples=200)
    assert [lr.at(n) for n in (101, 500, 800)] == [1.0, 1.0, 1.0]
    assert lr.at(900) == pytest.approx(0.1 + 0.9 * halfway)
    assert lr.at(1000) == pytest.approx(0.1)


def test_wsd_without_a_decay_phase_is_constant():
    assert schedule(style="WSD").at(1000) == 1.0


def test_warmup_as_long_as_the_decay_does_not_divide_by_zero():
    assert schedule(warmup_samples=1000).at(1000) == 1.0
    assert schedule(warmup_samples=1000).at(1001) == 0.1


@given(
    style=st.sampled_from(STYLES),
    wsd_style=st.sampled_from(WSD_STYLES),
    warmup=st.integers(0, 500),
    wsd=st.integers(0, 400),
    samples=st.lists(st.integers(0, 2000), min_size=2, max_size=10),
)
def test_it_stays_in_bounds_and_never_rises_after_warmup(style, wsd_style, warmup, wsd, samples):
    lr = schedule(style=style, wsd_style=wsd_style, warmup_samples=warmup, wsd_decay_samples=wsd)
    values = [lr.at(n) for n in sorted(samples)]
    assert all(0.0 <= value <= 1.0 for value in values)
    after = [lr.at(n) for n in sorted(samples) if n >= warmup]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    assert values == [lr.at(n) for n in sorted(samples)]


@pytest.mark.parametrize(
    ("style", "at", "expected"),
    [("linear", 0, 0.1), ("linear", 25, 0.2), ("cosine", 0, 0.1), ("cosine", 50, 0.3), ("linear", 101, 0.5)],
)
def test_weight_decay_grows(style, at, expected):
    assert WeightDecaySchedule(0.1, 0.5, style, 100).at(at) == pytest.approx(expected)


def test_constant_weight_decay_is_its_end_value():
    assert WeightDecaySchedule(0.1, 0.5).at(0) == 0.5
