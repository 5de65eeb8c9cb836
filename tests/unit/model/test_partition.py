import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.model import ExitConfig
from megatron.errors import ConfigError
from megatron.exits.spec import exit_specs
from megatron.model.partition import partition


@st.composite
def layouts(draw):
    depths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any))
    layers = sum(depths)
    exits = draw(st.lists(st.integers(1, layers), unique=True, max_size=layers))
    return depths, tuple(exits), draw(st.booleans())


@given(layouts())
def test_each_layer_and_exit_is_owned_once(layout):
    depths, exits, pre = layout
    stages, layers = len(depths), sum(depths)
    specs = exit_specs(ExitConfig(exit_layer_nums=exits, pre_exit=pre))
    parts = partition(depths, specs)
    assert [part.last - part.first for part in parts] == depths
    assert [layer for part in parts for layer in range(part.first, part.last)] == list(range(layers))
    owned = [spec.label for part in parts for spec in part.exits]
    assert owned == [str(n) for n in sorted(exits)]
    for part in parts:
        assert all(part.first <= spec.layer < part.last for spec in part.exits)
    assert [part.is_first for part in parts] == [True] + [False] * (stages - 1)
    assert [part.is_last for part in parts] == [False] * (stages - 1) + [True]


def test_post_exit_and_next_pre_exit_are_owned_by_neighbours():
    """The same function, but the pre-exit form moves the head off the first stage (spec §1.3)."""
    post = partition((4, 4), exit_specs(ExitConfig(exit_layer_nums=(4,))))
    pre = partition((4, 4), exit_specs(ExitConfig(exit_layer_nums=(5,), pre_exit=True)))
    assert [len(part.exits) for part in post] == [1, 0]
    assert [len(part.exits) for part in pre] == [0, 1]


def test_an_exit_outside_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"exit 9 is not a layer of 1\.\.8"):
        partition((4, 4), exit_specs(ExitConfig(exit_layer_nums=(9,))))
