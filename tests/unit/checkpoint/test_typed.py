import pytest
import torch

from megatron.checkpoint.typed import count, mapping, number, sequence, text
from megatron.errors import CheckpointError


@pytest.mark.parametrize(
    ("getter", "value", "expected"),
    [
        (count, 0, 0),
        (count, torch.tensor(7.0), 7),
        (count, torch.tensor([7]), 7),
        (number, 2.5, 2.5),
        (number, torch.tensor([0.5]), 0.5),
        (text, "", ""),
        (mapping, {}, {}),
        (sequence, (), ()),
    ],
)
def test_values_of_the_right_type(getter, value, expected):
    assert getter({"key": value}, "key", "here") == expected


@pytest.mark.parametrize(
    ("getter", "values"),
    [
        (count, [None, True, "1", -1, 1.0, 0.5, torch.tensor(0.5), torch.tensor([1, 2]), [1]]),
        (number, [None, False, "1", float("nan"), float("inf"), 1j]),
        (text, [None, 1, ["a"]]),
        (mapping, [None, [], "a"]),
        (sequence, [None, {}, "abc", 3]),
    ],
)
def test_wrong_values_are_named_with_key_and_place(getter, values):
    for value in values:
        with pytest.raises(CheckpointError, match=r"here: key is .*damaged"):
            getter({"key": value}, "key", "here")
    with pytest.raises(CheckpointError, match="here lacks key"):
        getter({}, "key", "here")


def test_long_values_are_cut():
    with pytest.raises(CheckpointError) as caught:
        count({"key": "x" * 10_000}, "key", "here")
    assert len(str(caught.value)) < 200
