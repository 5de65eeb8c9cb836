"""Blending: how a request is shared out, and samples that come in the weights' proportion."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.blend import BlendedDataset, normalised, requests
from megatron.data.gpt import GPTDataset, SampleSpec
from megatron.data.index_builder import numpy_blend
from megatron.data.indexed import IndexedDataset


@pytest.fixture
def members(write_corpus) -> list[GPTDataset]:
    """Two datasets of 31 and 71 samples or more."""
    return [
        GPTDataset(
            IndexedDataset(write_corpus([30] * number, name)), range(number), SampleSpec("train", asked, 16, 1, None)
        )
        for name, number, asked in (("a", 20, 31), ("b", 40, 71))
    ]


def test_requests() -> None:
    assert requests(100, [0.3, 0.7]) == [31, 71]
    assert requests(1, [1.0]) == [2]
    assert requests(0, [0.5, 0.5]) == [0, 0]


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=12), st.integers(1, 400))
def test_the_request_never_runs_a_dataset_dry(weights: list[float], num_samples: int) -> None:
    """Within the samples that were asked for, no dataset is asked for more than its part."""
    shares = normalised(weights)
    asked = requests(num_samples, shares)
    assert sum(asked) >= num_samples
    dataset, _ = numpy_blend(np.array(shares), num_samples)
    assert np.all(np.bincount(dataset, minlength=len(shares)) <= asked)


def test_samples_come_from_their_datasets(members: list[GPTDataset]) -> None:
    blended = BlendedDataset(members, [0.3, 0.7], 102)
    assert len(blended) == 102
    counts = [0, 0]
    for i, which in enumerate(blended.index["index"].tolist()):
        assert blended[i].tolist() == members[which][counts[which]].tolist()
        counts[which] += 1
    assert counts == [31, 71]
    for index in (-1, 102):
        with pytest.raises(IndexError):
            blended[index]


def test_rounding_surplus_starts_a_dataset_again(members: list[GPTDataset]) -> None:
    size = 3 * len(members[0])
    blended = BlendedDataset(members, [1.0, 0.0], size)
    assert blended[size - 1].tolist() == members[0][len(members[0]) - 1].tolist()


def test_cached_only_where_asked(members: list[GPTDataset], tmp_path: Path, messages: list[str]) -> None:
    BlendedDataset(members, [0.3, 0.7], 102)
    assert not messages or not any("memory" in message for message in messages)
    cache = tmp_path / "cache"
    first = BlendedDataset(members, [0.3, 0.7], 102, str(cache))
    assert sorted(path.name[32:] for path in cache.iterdir()) == [".dsc", "_index.npy", "_sample_index.npy"]
    assert next(cache.glob("*.dsc")).read_text() == first.description
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = BlendedDataset(members, [0.3, 0.7], 102, str(cache))
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    assert [again[i].tolist() for i in range(102)] == [first[i].tolist() for i in range(102)]


@pytest.mark.parametrize("name", ["index", "sample_index"])
@pytest.mark.parametrize("damage", ["shape", "value", "cut"])
def test_damaged_cache_is_built_again(members, tmp_path: Path, name: str, damage: str, messages: list[str]) -> None:
    cache = tmp_path / "cache"
    expected = np.array(BlendedDataset(members, [0.3, 0.7], 102, str(cache)).index[name])
    path = next(cache.glob(f"????????????????????????????????_{name}.npy"))
    array = np.load(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "shape":
        np.save(path, array[:-1])
    else:
        array[50] += 1
        np.save(path, array)
    again = BlendedDataset(members, [0.3, 0.7], 102, str(cache))
    assert again.index[name].tolist() == expected.tolist()
    assert any("is damaged" in message for message in messages)


def test_description_ignores_print_options(members: list[GPTDataset]) -> None:
    expected = BlendedDataset(members, [1 / 3, 2 / 3], 5).description
    assert "Weights: [0.33333333 0.66666667]\nSize: 5\n" in expected
    with np.printoptions(precision=2, suppress=True):
        assert BlendedDataset(members, [1 / 3, 2 / 3], 5).description == expected
