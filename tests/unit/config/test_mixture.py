"""Blends and splits as flags spell them, and what is none."""

import pytest

from megatron.config.mixture import parse_blend, parse_split
from megatron.errors import ConfigError


def test_blend() -> None:
    assert parse_blend(["p"], "--data-path") == (["p"], None)
    assert parse_blend(["0.3", "p", "7e-1", "q"], "--data-path") == (["p", "q"], [0.3, 0.7])
    assert parse_blend(["2", "p", "0", "q"], "--data-path") == (["p", "q"], [2.0, 0.0])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "0 entries"),
        ([""], "an empty word stands where a prefix should"),
        (["1", ""], "an empty word stands where a prefix should"),
        (["1", "p", "2"], "3 entries: give one prefix, or weight1 prefix1"),
        (["p", "q"], "'p' stands where a weight should"),
        (["-1", "p", "2", "q"], "weight -1 must be"),
        (["nan", "p"], "weight nan must be"),
        (["inf", "p", "1", "q"], "weight inf must be"),
        (["0", "p", "0.0", "q"], "all weights are 0"),
        (["1e308", "p", "1e308", "q"], "sum of the weights is too large"),
        (["1", "p"] * 32768, "32768 datasets; a blend holds at most 32767"),
    ],
)
def test_what_is_no_blend(entries: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--valid-data-path.*{message}"):
        parse_blend(entries, "--valid-data-path")


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("969, 30, 1", (0.969, 0.03, 0.001)),
        ("3/1", (0.75, 0.25, 0)),
        ("7", (1, 0, 0)),
        ("1,,1", (0.5, 0, 0.5)),
        (",1", (0, 1, 0)),
        ("100,", (1, 0, 0)),
    ],
)
def test_split(split: str, shares: tuple[float, float, float]) -> None:
    assert parse_split(split) == shares


@pytest.mark.parametrize("split", ["", ",,", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf", "1;2", "1e308,1e308"])
def test_no_split(split: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        parse_split(split)
