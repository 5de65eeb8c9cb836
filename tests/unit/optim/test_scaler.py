"""Dynamic loss scaling: when it doubles, when it halves, how long it hesitates, and that it survives a restart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.optim.scaler import LossScaler


def dynamic(**changes) -> LossScaler:
    return LossScaler(**{"scale": 64.0, "dynamic": True, "window": 3, "hysteresis": 2, "overflows_left": 2, **changes})


def after(scaler: LossScaler, steps: str) -> LossScaler:
    """`.` is a clean step, `x` an overflow."""
    for step in steps:
        scaler.update(overflow=step == "x")
    return scaler


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        ("..", 64),
        ("...", 128),
        ("......", 256),
        ("x", 64),  # the first overflow is forgiven
        ("xx", 32),
        ("xxx", 16),  # and once patience is used up, every further one halves
        ("x.x", 32),  # clean steps do not give patience back ...
        ("x...x", 128),  # ... growth does
        ("x...xx", 64),
        ("..x..", 64),  # an overflow starts the count of clean steps anew
        ("..x...", 128),
    ],
)
def test_scale_after(steps, scale):
    assert after(dynamic(), steps).scale == scale


def test_it_never_falls_below_the_minimum():
    assert after(dynamic(min_scale=8.0), "x" * 20).scale == 8.0


def test_hysteresis_of_one_halves_at_once():
    assert after(dynamic(hysteresis=1, overflows_left=1), "x").scale == 32


def test_a_static_scale_never_moves():
    scaler = after(LossScaler(scale=512.0), "x....x..xx")
    assert scaler.scale == 512.0
    scaler.restore({"scale": 2.0, "growth_tracker": 0, "hysteresis_tracker": 1})
    assert scaler.scale == 512.0


@given(before=st.text(".x", max_size=12), later=st.text(".x", max_size=12))
def test_restored_it_goes_on_as_if_nothing_had_happened(before, later):
    straight = after(dynamic(), before)
    resumed = dynamic(scale=1.0)
    resumed.restore(straight.facts())
    assert after(resumed, later) == after(straight, later)


def test_no_facts_change_nothing():
    scaler = dynamic()
    scaler.restore({})
    assert scaler == dynamic()
