import pytest

from megatron.config.model import ExitConfig
from megatron.errors import ConfigError
from megatron.exits.spec import exit_specs
from megatron.inference.policy import ConfidencePolicy

SECOND, FOURTH = exit_specs(ExitConfig(exit_layer_nums=(4, 2)))


def test_exit_where_confidence_reaches_the_threshold() -> None:
    policy = ConfidencePolicy(0.5)
    assert [policy.wants_exit(SECOND, c) for c in (0.0, 0.49999, 0.5, 1.0)] == [False, False, True, True]
    assert ConfidencePolicy(0.0).wants_exit(SECOND, 0.0)
    assert not ConfidencePolicy(0.0).wants_exit(SECOND, float("nan"))


@pytest.mark.parametrize("threshold", [1.0, 1, 40.0, float("inf")])
def test_a_threshold_of_one_or_more_never_looks(threshold: float) -> None:
    assert not ConfidencePolicy(threshold).evaluates(SECOND)


def test_exit_layers_choose_exits() -> None:
    assert [ConfidencePolicy(0.5).evaluates(spec) for spec in (SECOND, FOURTH)] == [True, True]
    assert [ConfidencePolicy(0.5, (4,)).evaluates(spec) for spec in (SECOND, FOURTH)] == [False, True]


def test_senseless_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="nan"):
        ConfidencePolicy(float("nan"))
    with pytest.raises(ConfigError, match="-1 deferred"):
        ConfidencePolicy(0.5, max_deferred=-1)
