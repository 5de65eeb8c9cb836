"""GPTDataset: every token in its place, a cache that is never trusted blindly, and errors with file and offset."""

import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.gpt import EpochPlan, GPTDataset, SampleSpec
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.errors import DataError

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")


def spec(num_samples: int = 100, seq_length: int = 16, seed: int = 1234, name: str = "train") -> SampleSpec:
    return SampleSpec(name, num_samples, seq_length, seed, "80,15,5")


def items(dataset: GPTDataset) -> list[list[int]]:
    return [dataset[i].tolist() for i in range(len(dataset))]


def cache_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("num_samples", [1, 50, 100, 500])
def test_samples_are_the_shuffled_documents_in_order(corpus: IndexedDataset, num_samples: int) -> None:
    """Unshuffled, samples tile the concatenation of the documents in doc_idx, one token shared by neighbours."""
    dataset = GPTDataset(corpus, range(5, 35), spec(num_samples))
    stream = np.concatenate([corpus[i] for i in dataset.index["doc_idx"]])
    assert len(dataset) == (len(stream) - 1) // 16 >= num_samples
    for i, place in enumerate(dataset.index["shuffle_idx"].astype(int)):
        assert dataset[i].dtype == np.int64
        assert dataset[i].tolist() == stream[place * 16 : place * 16 + 17].tolist()


def test_passes_over_the_documents(corpus: IndexedDataset) -> None:
    """Every document appears once a pass; a last pass that is hardly used is shuffled by itself."""
    documents = range(5, 35)
    tokens = sum(len(corpus[i]) for i in documents)
    per_pass = (tokens - 1) // 16
    for requested in (3 * per_pass - 1, 2 * per_pass + 3):
        dataset = GPTDataset(corpus, documents, spec(requested))
        doc_idx = dataset.index["doc_idx"].tolist()
        assert Counter(doc_idx) == dict.fromkeys(documents, 3)
        apart = requested == 2 * per_pass + 3
        assert (sorted(doc_idx[-30:]) == list(documents)) == apart
        full = (2 * tokens - 1) // 16
        assert (max(dataset.index["shuffle_idx"][:full]) < full) == apart


@given(st.integers(2, 5000), st.integers(1, 300), st.integers(1, 3000))
def test_plan_is_the_smallest_that_suffices(tokens: int, seq_length: int, requested: int) -> None:
    plan = EpochPlan.make(tokens, seq_length, requested)
    assert plan.num_samples == (plan.num_epochs * tokens - 1) // seq_length >= requested
    assert plan.num_epochs == 1 or ((plan.num_epochs - 1) * tokens - 1) // seq_length < requested
    assert plan.shuffled_apart is None or 0 < plan.shuffled_apart < plan.num_samples


def test_wide_shuffle_index() -> None:
    from megatron.data.gpt import _shuffle_dtype

    assert _shuffle_dtype(EpochPlan(1, 2**32 - 3, None)) is np.uint32
    assert _shuffle_dtype(EpochPlan(1, 2**32 - 2, None)) is np.int64


def test_same_request_same_samples(corpus: IndexedDataset, tmp_path: Path) -> None:
    first = items(GPTDataset(corpus, range(40), spec(), str(tmp_path / "a")))
    assert items(GPTDataset(corpus, range(40), spec(), str(tmp_path / "b"))) == first
    assert items(GPTDataset(corpus, range(40), spec(seed=1), str(tmp_path / "a"))) != first
    assert cache_files(tmp_path / "a").items() > cache_files(tmp_path / "b").items()


def test_documents_shorter_than_samples_and_empty_sequences(tmp_path: Path) -> None:
    lengths = [0, 3, 0, 0, 1, 2, 0, 30, 0]
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        for length in lengths:
            writer.add_document(list(range(length)), [length])
    indexed = IndexedDataset(tmp_path / "x")
    for seed in range(20):
        dataset = GPTDataset(indexed, range(9), spec(12, seq_length=7, seed=seed))
        stream = np.concatenate([indexed[i] for i in dataset.index["doc_idx"]])
        places = dataset.index["shuffle_idx"].astype(int)
        assert items(dataset) == [stream[place * 7 : place * 7 + 8].tolist() for place in places]


def test_a_corpus_shorter_than_one_sample(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    dataset = GPTDataset(IndexedDataset(tmp_path / "x"), range(1), spec(1, seq_length=8))
    assert items(dataset) == [[1, 2, 3, 1, 2, 3, 1, 2, 3]]


def test_indices_beyond_the_end(corpus: IndexedDataset) -> None:
    dataset = GPTDataset(corpus, range(40), spec())
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]


def test_pickle_holds_no_arrays(corpus: IndexedDataset) -> None:
    dataset = GPTDataset(corpus, range(40), spec(5000))
    content = pickle.dumps(dataset)
    assert len(content) < 3000
    assert items(pickle.loads(content))[:50] == items(dataset)[:50]


def test_nothing_to_cut(write_corpus, tmp_path: Path) -> None:
    indexed = IndexedDataset(write_corpus([3, 4]))
    with pytest.raises(DataError, match=r"train split has 0 of 2 documents with 0 tokens .*--split 80,15,5"):
        GPTDataset(indexed, range(0), spec())
    with IndexedWriter(tmp_path / "empty", np.uint16) as writer:
        writer.add_document([])
        writer.add_document([], [0])
    with pytest.raises(DataError, match="1 of 1 documents with 0 tokens"):
        GPTDataset(IndexedDataset(tmp_path / "empty"), range(1), spec())


def test_too_many_passes_to_count(write_corpus) -> None:
    with pytest.raises(DataError, match="more visits than the index format can count"):
        GPTDataset(IndexedDataset(write_corpus([1, 1])), range(2), spec(2**32, seq_length=8))


def test_floats_are_no_tokens(write_corpus) -> None:
    with pytest.raises(DataError, match=r"corpus\.idx holds float32 values"):
        GPTDataset(IndexedDataset(write_corpus([3, 4], dtype=np.float32)), range(2), spec())


# The cache


def test_cache_beside_the_data_by_default(corpus: IndexedDataset, messages: list[str]) -> None:
    GPTDataset(corpus, range(40), spec())
    beside = Path(corpus.prefix).parent / "index-cache"
    files = cache_files(beside)
    assert sorted({name.split(".")[-1] for name in files}) == ["dsc", "npy"] and len(files) == 4
    times = {path.name: path.stat().st_mtime_ns for path in beside.iterdir()}
    GPTDataset(corpus, range(40), spec())
    assert {path.name: path.stat().st_mtime_ns for path in beside.iterdir()} == times
    assert not [message for message in messages if "cache" in message]


def test_cache_beside_the_data_comes_first(corpus: IndexedDataset, tmp_path: Path) -> None:
    GPTDataset(corpus, range(40), spec())
    GPTDataset(corpus, range(40), spec(), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_cache_in_the_given_place(corpus: IndexedDataset, tmp_path: Path) -> None:
    GPTDataset(corpus, range(40), spec(), str(tmp_path / "deep" / "other"))
    assert len(list((tmp_path / "deep" / "other").iterdir())) == 4
    assert not (Path(corpus.prefix).parent / "index-cache").exists()


def test_unwritable_places(corpus: IndexedDataset, tmp_path: Path, messages: list[str]) -> None:
    """A given place that cannot be written falls back beside the data; where that fails too, to memory."""
    in_order = items(GPTDataset(corpus, range(40), spec(), str(tmp_path / "good")))
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "cache")
    assert items(GPTDataset(corpus, range(40), spec(), blocked)) == in_order
    assert any(blocked in message and "cannot be written" in message for message in messages)
    beside = tmp_path / "index-cache"
    assert len(list(beside.iterdir())) == 4
    shutil.rmtree(beside)
    beside.write_text("")
    messages.clear()
    dataset = GPTDataset(corpus, range(40), spec())
    assert items(dataset) == in_order
    assert any("kept in memory" in message for message in messages)
    assert items(pickle.loads(pickle.dumps(dataset))) == in_order


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_zeros(path: Path) -> None:
    """The header survives, the data do not: what a crash of the machine can leave."""
    header = len(np.lib.format.MAGIC_PREFIX) + 4 + 118
    path.write_bytes(path.read_bytes()[:header] + bytes(path.stat().st_size - header))


def damage_delete(path: Path) -> None:
    path.unlink()


def damage_shape(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def damage_dtype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


def damage_objects(path: Path) -> None:
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)


def damage_value(path: Path) -> None:
    array = np.load(path)
    array[len(array) // 2] += 1
    np.save(path, array)


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_cache_is_built_again(corpus: IndexedDataset, tmp_path: Path, name: str, damage, messages) -> None:
    cache = tmp_path / "cache"
    before = items(GPTDataset(corpus, range(40), spec(), str(cache)))
    files = cache_files(cache)
    damage(next(cache.glob(f"*_{name}.npy")))
    assert items(GPTDataset(corpus, range(40), spec(), str(cache))) == before
    assert sum("is damaged and will be built again" in message for message in messages) == 1
    assert cache_files(cache) == files


def test_one_wrong_start_is_found_where_it_matters(corpus: IndexedDataset, tmp_path: Path) -> None:
    """A start inside that is off by a token still runs forward; the length of the samples beside it tells."""
    dataset = GPTDataset(corpus, range(40), spec(), str(tmp_path / "cache"))
    path = next((tmp_path / "cache").glob("*_sample_idx.npy"))
    rows = np.load(path)
    row = next(i for i in range(1, len(rows) - 1) if rows[i, 0] == rows[i + 1, 0])
    rows[row, 1] += 1
    np.save(path, rows)
    dataset = GPTDataset(corpus, range(40), spec(), str(tmp_path / "cache"))
    wrong = 0
    for index in range(len(dataset)):
        try:
            dataset[index]
        except DataError as error:
            assert "delete the cache" in str(error) and f"at sample {index}:" in str(error)
            wrong += 1
    assert wrong == 2


def test_foreign_description_is_not_believed(corpus: IndexedDataset, tmp_path: Path, messages: list[str]) -> None:
    GPTDataset(corpus, range(40), spec(), str(tmp_path / "cache"))
    dsc = next((tmp_path / "cache").glob("*.dsc"))
    text = dsc.read_text()
    dsc.write_text(text.replace("1234", "1235"))
    GPTDataset(corpus, range(40), spec(), str(tmp_path / "cache"))
    assert dsc.read_text() == text
    assert any("description" in message for message in messages)


@pytest.mark.parametrize("lengths", [[31] * 44, [30] * 39 + [31], list(range(10, 50))])
def test_cache_of_other_data_under_the_same_name(write_corpus, tmp_path: Path, lengths: list[int], messages) -> None:
    """The files were replaced since, perhaps by ones of nearly the same shape: the index is built anew."""
    first = IndexedDataset(write_corpus([30] * 40))
    GPTDataset(first, range(40), spec(), str(tmp_path / "cache"))
    second = IndexedDataset(write_corpus(lengths))
    dataset = GPTDataset(second, range(len(lengths)), spec(), str(tmp_path / "cache"))
    assert any("is damaged" in message for message in messages)
    fresh = GPTDataset(second, range(len(lengths)), spec(), str(tmp_path / "fresh"))
    assert items(dataset) == items(fresh)


@pytest.mark.parametrize("crash_after", range(4))
def test_a_crash_while_building_leaves_nothing_half(
    corpus: IndexedDataset, tmp_path: Path, crash_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of the four renames: no temporary file, no half array, no description; then a new start."""
    import os

    class Crash(BaseException):
        pass

    real, calls = os.replace, []

    def replace(*arguments) -> None:
        calls.append(arguments)
        if len(calls) > crash_after:
            raise Crash
        real(*arguments)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Crash):
            GPTDataset(corpus, range(40), spec(), str(cache))
    assert len(list(cache.iterdir())) == crash_after
    assert not list(cache.glob("*.dsc")) and not list(cache.glob("*.tmp"))
    again = items(GPTDataset(corpus, range(40), spec(), str(cache)))
    assert again == items(GPTDataset(corpus, range(40), spec(), str(tmp_path / "other")))


# Tokens


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 500), (np.int32, 70000), (np.int32, -1)])
def test_out_of_range_token(tmp_path: Path, dtype: type, token: int) -> None:
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        writer.add_document(list(range(100)))
        writer.add_document([5] * 60 + [token] + [5] * 39)
    dataset = GPTDataset(IndexedDataset(tmp_path / "x"), range(2), spec(12, 16), vocab_size=500)
    position = (100 + 60) * np.dtype(dtype).itemsize
    failures = []
    for i in range(len(dataset)):
        try:
            dataset[i]
        except DataError as error:
            failures.append(str(error))
    assert 1 <= len(failures) <= 2
    for message in failures:
        assert f"x.bin: token {token} in document 1 at byte {position} is not in 0..499" in message


def test_without_a_vocabulary_only_negative_tokens_are_wrong(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add_document([2**31 - 1] * 50)
        writer.add_document([1, -7] * 25)
    indexed = IndexedDataset(tmp_path / "x")
    assert GPTDataset(indexed, range(1), spec(3))[0].tolist() == [2**31 - 1] * 17
    with pytest.raises(DataError, match="token -7 in document 1 at byte 204 is not at least 0"):
        items(GPTDataset(indexed, range(1, 2), spec(3)))


def test_file_cut_in_the_middle_of_a_run(corpus: IndexedDataset) -> None:
    dataset = GPTDataset(corpus, range(40), spec())
    size = Path(corpus.bin_path).stat().st_size
    with open(corpus.bin_path, "r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(DataError, match=r"corpus\.bin ends before byte \d+, where \d+ more"):
        items(dataset)
