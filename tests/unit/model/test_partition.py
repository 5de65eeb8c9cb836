import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.model import ExitConfig
from megatron.errors import ConfigError
from megatron.exits.spec import exit_specs
from megatron.model.partition import partition


@st.composite
def layouts(draw):
    stages, depth = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    layers = stages * depth
    exits = draw(st.lists(st.integers(1, layers), unique=True, max_size=layers))
    return stages, layers, tuple(exits), draw(st.booleans())


@given(layouts())
def test_each_layer_and_exit_is_owned_once(layout):
    stages, layers, exits, pre = layout
    specs = exit_specs(ExitConfig(exit_layer_nums=exits, pre_exit=pre))
    parts = partition(layers, specs, stages)
    assert [layer for part in parts for layer in range(part.first, part.last)] == list(range(layers))
    owned = [spec.label for part in parts for spec in part.exits]
    assert owned == [str(n) for n in sorted(exits)]
    for part in parts:
        assert all(part.first <= spec.layer < part.last for spec in part.exits)
    assert [part.is_first for part in parts] == [True] + [False] * (stages - 1)
    assert [part.is_last for part in parts] == [False] * (stages - 1) + [True]


def test_post_exit_and_next_pre_exit_are_owned_by_neighbours():
    """The same function, but the pre-exit form moves the head off the first stage (spec §1.3)."""
    post = partition(8, exit_specs(ExitConfig(exit_layer_nums=(4,))), 2)
    pre = partition(8, exit_specs(ExitConfig(exit_layer_nums=(5,), pre_exit=True)), 2)
    assert [len(part.exits) for part in post] == [1, 0]
    assert [len(part.exits) for part in pre] == [0, 1]


def test_refusals():
    with pytest.raises(ConfigError, match="--num-layers 5 does not divide into 2"):
        partition(5, (), 2)
    with pytest.raises(ConfigError, match=r"exit 9 is not a layer of 1\.\.8"):
        partition(8, exit_specs(ExitConfig(exit_layer_nums=(9,))), 2)
