import pytest

from megatron.errors import ConfigError
from megatron.inference.request import Result, SamplingParams, Token


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_new_tokens": 0}, "tokens to generate"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 1.5}, "top-p"),
        ({"top_p": float("nan")}, "top-p"),
        ({"top_k": 3, "top_p": 0.5}, "both"),
        ({"seed": -1}, "seed"),
    ],
)
def test_senseless_values_are_refused(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**wrong)


def test_greedy() -> None:
    assert SamplingParams().greedy
    assert SamplingParams(temperature=0.7, top_k=1).greedy
    assert SamplingParams(temperature=0.0, top_p=0.9).greedy
    assert not SamplingParams(temperature=0.7).greedy


def test_result_adds_up_its_tokens() -> None:
    tokens = (Token(5, "2", 0.9, -0.1, 0.5, 2, 16), Token(7, "final", 0.4, -0.9, 0.25, 4, 8))
    result = Result(tokens, "a b", "length")
    assert result.ids == [5, 7]
    assert (result.seconds, result.layer_passes, result.layer_executions) == (0.75, 6, 24)
