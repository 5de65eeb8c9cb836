"""From data flags to the three datasets."""

import numpy as np
import pytest

from megatron.config.data import DataConfig
from megatron.data.blend import BlendedDataset
from megatron.data.build import build_datasets
from megatron.data.gpt import GPTDataset
from megatron.errors import ConfigError, DataError


def test_one_corpus_and_a_split(write_corpus) -> None:
    prefix = write_corpus([20] * 40)
    train, valid, test = build_datasets(DataConfig(data_path=(prefix,), split="80,15,5"), (50, 5, 2), 16, 1234, 500)
    assert isinstance(train, GPTDataset) and isinstance(valid, GPTDataset) and isinstance(test, GPTDataset)
    documents = [set(dataset.index["doc_idx"].tolist()) for dataset in (train, valid, test)]
    assert documents == [set(range(32)), set(range(32, 38)), set(range(38, 40))]
    assert train.indexed is valid.indexed is test.indexed
    assert train.vocab_size == 500


def test_separate_files(write_corpus) -> None:
    a, b = write_corpus([20] * 40, "a"), write_corpus([20] * 30, "b")
    train, valid, test = build_datasets(DataConfig(train_data_path=(a,), valid_data_path=(b,)), (50, 5, 2), 16, 1)
    assert len(set(train.index["doc_idx"].tolist())) == 40
    assert len(set(valid.index["doc_idx"].tolist())) == 30
    assert "Split None" in train.description
    assert test is None


def test_blend(write_corpus) -> None:
    a, b, c = write_corpus([20] * 40, "a"), write_corpus([20] * 30, "b"), write_corpus([20] * 20, "c")
    data = DataConfig(data_path=("3", a, "0", c, "7", b), split="1")
    train, valid, test = build_datasets(data, (100, 0, 0), 16, 1)
    assert isinstance(train, BlendedDataset) and len(train) == 31 + 71
    assert [dataset.indexed.prefix for dataset in train.datasets] == [a, b]  # weight 0: not even opened
    assert valid is test is None
    assert np.bincount(train.index["index"]).tolist() == [31, 71]


def test_nothing_asked_nothing_opened() -> None:
    assert build_datasets(DataConfig(data_path=("no-such-file",)), (0, 0, 0), 16, 1) == (None, None, None)


def test_evaluation_split_without_documents(write_corpus, messages: list[str]) -> None:
    """A small corpus under the default split: no test set, said aloud; training goes on."""
    prefix = write_corpus([20] * 40)
    _, valid, test = build_datasets(DataConfig(data_path=(prefix,)), (50, 5, 2), 16, 1)
    assert valid is not None and test is None
    assert any("none of its 40 documents belongs to the test split" in message for message in messages)


def test_blend_member_without_documents(write_corpus, messages: list[str]) -> None:
    """The others share its weight."""
    a, b, c = write_corpus([20] * 40, "a"), write_corpus([20] * 2, "b"), write_corpus([20] * 40, "c")
    data = DataConfig(data_path=("1", a, "2", b, "1", c), split="90,10")
    _, valid, _ = build_datasets(data, (10, 20, 0), 16, 1)
    assert [dataset.indexed.prefix for dataset in valid.datasets] == [a, c]
    assert np.bincount(valid.index["index"]).tolist() == [11, 11]
    assert any(f"{b}: none of its 2" in message for message in messages)


def test_training_split_without_documents(write_corpus) -> None:
    prefix = write_corpus([20] * 3)
    with pytest.raises(DataError, match=r"none of its 3 documents belongs to the train split of --split 0,1;"):
        build_datasets(DataConfig(data_path=(prefix,), split="0,1"), (50, 0, 0), 16, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(), "no training data: give --data-path"),
        (DataConfig(valid_data_path=("x",)), "no training data"),
        (DataConfig(data_path=("x",), test_data_path=("y",)), "exclude each other"),
        (DataConfig(train_data_path=("1", "x", "2")), "--train-data-path has 3 entries"),
    ],
)
def test_flags_that_do_not_fit(data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_datasets(data, (10, 0, 0), 16, 1)


def test_missing_file_is_found_before_the_first_step(write_corpus) -> None:
    data = DataConfig(data_path=("1", write_corpus([20] * 40), "1", "no/such"), split="1")
    with pytest.raises(DataError, match=r"no/such\.idx does not exist"):
        build_datasets(data, (10, 0, 0), 16, 1)
