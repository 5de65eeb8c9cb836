"""Splits: Megatron's rounding, and how many samples a run asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.splits import samples_per_split, split_documents
from megatron.errors import ConfigError

shares = st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda values: sum(values) > 0)


@pytest.mark.parametrize(
    ("split", "num_documents", "borders"),
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]),
        ("80,15,5", 40, [0, 32, 38, 40]),
        ("90/10", 40, [0, 36, 40, 40]),
        ("949,50,1", 307, [0, 292, 307, 307]),  # 291.3 + 15.4 + 0.3: one document short, so borders move up
        ("1", 7, [0, 7, 7, 7]),
        ("0,0,1", 7, [0, 0, 0, 7]),
        ("1,,1", 10, [0, 5, 5, 10]),
        ("1,1,1", 2, [0, 0, 1, 2]),  # each third rounds to 1: one too many, taken from the first
        ("0,1,1", 3, [0, 0, 1, 3]),  # both halves round to 2: the first border would be -1
    ],
)
def test_borders(split: str, num_documents: int, borders: list[int]) -> None:
    ranges = split_documents(split, num_documents)
    assert [ranges[0].start, *(part.stop for part in ranges)] == borders


@given(shares, st.integers(0, 10**6))
def test_every_document_has_one_split(values: list[float], num_documents: int) -> None:
    ranges = split_documents(",".join(map(repr, values)), num_documents)
    assert ranges[0].start == 0 and ranges[2].stop == num_documents
    assert ranges[0].stop == ranges[1].start and ranges[1].stop == ranges[2].start
    assert all(part.start <= part.stop for part in ranges)


def test_samples_per_split() -> None:
    assert samples_per_split(20, 16, 1000, 1) == (320, 16, 16)
    assert samples_per_split(100, 8, 30, 5) == (800, 160, 40)
    assert samples_per_split(100, 8, 30, 0) == (800, 0, 0)
    assert samples_per_split(100, 8, 30, 5, train_samples=777) == (777, 160, 40)
    with pytest.raises(ConfigError, match="--eval-interval"):
        samples_per_split(100, 8, 0, 5)
