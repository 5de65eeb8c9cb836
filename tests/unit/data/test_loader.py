"""Microbatches: masks and positions at document ends, and a loader that resumes, shares out and touches no RNG."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.gpt import GPTDataset, SampleSpec
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import build_loader, make_microbatch
from megatron.data.sampler import BatchOrder
from megatron.errors import DataError

EOD = 9


class Numbers:
    """Sample i is (i, i, i)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(3, index, np.int64)


def test_plain() -> None:
    text = torch.tensor([[1, EOD, 3, 4], [5, 6, 7, 8]])
    batch = make_microbatch(text, EOD)
    assert batch.tokens.tolist() == [[1, EOD, 3], [5, 6, 7]]
    assert batch.labels.tolist() == [[EOD, 3, 4], [6, 7, 8]]
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
    assert batch.loss_mask.dtype == torch.float32 and batch.loss_mask.tolist() == [[1.0] * 3] * 2
    assert batch.position_ids is None and batch.document_ids is None


def test_document_ends_by_hand() -> None:
    """An eod belongs to the document it ends; the last token of `text` is a label only."""
    text = torch.tensor([[1, 2, EOD, 3, EOD, EOD, 4, EOD], [EOD, 1, 2, 3, 4, 5, 6, 7]])
    batch = make_microbatch(text, EOD, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]]
    assert batch.position_ids.dtype == batch.document_ids.dtype == torch.int64


@given(st.lists(st.integers(EOD - 2, EOD), min_size=2, max_size=20))
def test_document_ends_token_by_token(text: list[int]) -> None:
    batch = make_microbatch(torch.tensor([text]), EOD, True, True, True)
    position = document = 0
    for i, token in enumerate(text[:-1]):
        assert batch.position_ids[0, i] == position
        assert batch.document_ids[0, i] == document
        assert batch.loss_mask[0, i] == (token != EOD)
        position, document = (0, document + 1) if token == EOD else (position + 1, document)


def test_each_flag_by_itself() -> None:
    text = torch.tensor([[1, EOD, 3, 4]])
    positions = make_microbatch(text, EOD, reset_position_ids=True)
    assert positions.position_ids.tolist() == [[0, 1, 0]] and positions.document_ids is None
    documents = make_microbatch(text, EOD, reset_attention_mask=True)
    assert documents.document_ids.tolist() == [[0, 0, 1]] and documents.position_ids is None
    assert documents.loss_mask.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_and_resume(num_workers: int) -> None:
    def first_column(order: BatchOrder) -> list[list[int]]:
        return [batch[:, 0].tolist() for batch in build_loader(Numbers(11), order, num_workers)]

    assert first_column(BatchOrder(2)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert first_column(BatchOrder(2, consumed_samples=4)) == [[4, 5], [6, 7], [8, 9]]
    assert first_column(BatchOrder(3, consumed_samples=4)) == [[4, 5, 6], [7, 8, 9]]
    assert first_column(BatchOrder(2, dp_rank=1, dp_size=2)) == [[2, 3], [6, 7]]


def test_cyclic_goes_on_for_ever() -> None:
    order = BatchOrder(5, dataloader_type="cyclic")
    batches = [batch[:, 0].tolist() for batch in islice(build_loader(Numbers(10), order), 40)]
    for number in range(20):
        assert sorted(batches[2 * number] + batches[2 * number + 1]) == list(range(10))
    resumed = build_loader(Numbers(10), BatchOrder(5, consumed_samples=35, dataloader_type="cyclic"))
    assert next(resumed)[:, 0].tolist() == batches[7]


def test_tensors(corpus: IndexedDataset) -> None:
    dataset = GPTDataset(corpus, range(40), SampleSpec("train", 20, 16, 1, None))
    batch = next(build_loader(dataset, BatchOrder(4)))
    assert batch.dtype == torch.int64 and batch.shape == (4, 17)
    assert batch.tolist() == [dataset[i].tolist() for i in range(4)]


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()
    for kind in ("single", "cyclic"):
        next(build_loader(Numbers(10), BatchOrder(2, dataloader_type=kind)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_tokens_reach_the_caller(corpus: IndexedDataset, num_workers: int) -> None:
    dataset = GPTDataset(corpus, range(40), SampleSpec("train", 20, 16, 1, None), vocab_size=10)
    with pytest.raises(DataError, match=r"^\S*corpus\.bin: token \d+ in document \d+ at byte \d+ .*damaged$"):
        next(build_loader(dataset, BatchOrder(4), num_workers))


def test_spawned_workers_read_the_same(corpus: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where workers are not forked (macOS) the dataset travels as a pickle."""
    dataset = GPTDataset(corpus, range(40), SampleSpec("train", 20, 16, 1, None))
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda *a, **k: loader(*a, **k, multiprocessing_context="spawn")
    )
    batch = next(build_loader(dataset, BatchOrder(4), num_workers=1))
    assert batch.tolist() == [dataset[i].tolist() for i in range(4)]
