"""One error for all faults."""

import pytest

from megatron.config.problems import raise_if_any
from megatron.errors import ConfigError


def test_nothing_wrong() -> None:
    raise_if_any([])


def test_one_fault_is_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        raise_if_any(["a"], "file")
    assert str(error.value) == "file: a"
    assert error.value.exit_code == 2


def test_many_faults_are_counted_and_said_once() -> None:
    with pytest.raises(ConfigError) as error:
        raise_if_any(["a", "b", "a"])
    assert str(error.value) == "2 settings need mending:\n  a\n  b"
