"""`GPTDataset`: fixed-length token samples cut from shuffled documents, the same as Megatron's for the same seed.

A sample is `seq_length + 1` tokens; neighbours overlap by one token; nothing is padded, and document borders
are invisible here (see `loader.make_microbatch`). Item i depends on (files, spec) alone.
"""

import os
from dataclasses import dataclass

import numpy as np

from megatron.data.index_builder import build_sample_index
from megatron.data.index_cache import Arrays, CachedArrays, IndexRecipe, load_or_build
from megatron.data.indexed import IndexedDataset
from megatron.errors import DataError

CACHE_DIRECTORY = "index-cache"  # beside the data, looked at before --data-cache-path
CHECK_CHUNK = 1 << 22  # rows of a cached sample index that are checked at a time


@dataclass(frozen=True)
class SampleSpec:
    """Which samples of which data: all that a dataset's index depends on, apart from the documents themselves."""

    name: str  # train, valid or test
    num_samples: int  # at least as many will be there, ≥ 1
    seq_length: int
    seed: int
    split: str | None  # as typed; None where the files serve one split only

    def description(self, prefix: str) -> str:
        """The text whose md5 names the index cache of data `prefix`, letter for letter Megatron's."""
        return (
            "GPT Dataset\n\n"
            f"Data prefix {prefix}\n"
            f"Dataset name {self.name}\n"
            f"Number of samples {self.num_samples}\n"
            f"Sequence length {self.seq_length}\n"
            f"Random seed {self.seed}\n"
            f"Split {self.split}\n"
        )


@dataclass(frozen=True)
class EpochPlan:
    """How many passes over the documents a request takes, and how many samples they give."""

    num_epochs: int
    num_samples: int  # of all passes together; at least the request
    shuffled_apart: int | None  # samples of all but the last pass, if the last is shuffled by itself

    @classmethod
    def make(cls, tokens_per_epoch: int, seq_length: int, requested: int) -> "EpochPlan":
        """The fewest passes that give `requested` samples (each seq_length tokens, and one more at the end).

        The last pass is shuffled by itself if less than 80 % of it is asked for: mixed with the others it would
        leave some documents seen less often than their neighbours.
        """

        def samples(epochs: int) -> int:
            return (epochs * tokens_per_epoch - 1) // seq_length

        epochs = -(-(requested * seq_length + 1) // tokens_per_epoch)
        full = samples(epochs - 1) if epochs > 1 else 0
        apart = epochs > 1 and requested - full < int(0.80 * samples(1))
        return cls(epochs, samples(epochs), full if apart else None)


def build_doc_idx(documents: range, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """int32 [num_epochs * len(documents)]: document ids in reading order."""

    def shuffled(epochs: int) -> np.ndarray:
        ids = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)
        random.shuffle(ids)
        return ids

    if plan.shuffled_apart is None:
        return shuffled(plan.num_epochs)
    return np.concatenate([shuffled(plan.num_epochs - 1), shuffled(1)])


def build_shuffle_idx(plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """uint32 (int64 where that is too narrow) [num_samples]: the sample that stands at each index."""
    first = plan.num_samples if plan.shuffled_apart is None else plan.shuffled_apart
    order: np.ndarray = np.arange(plan.num_samples, dtype=_shuffle_dtype(plan))
    random.shuffle(order[:first])
    if first < plan.num_samples:
        random.shuffle(order[first:])
    return order


def _shuffle_dtype(plan: EpochPlan) -> type:
    return np.int64 if plan.num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32


class GPTDataset:
    """Map-style dataset of int64 [seq_length + 1] arrays over some documents of an `IndexedDataset`.

    `description` is the text that names its index cache. Pickles cheaply; safe to read from forked workers.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        spec: SampleSpec,
        data_cache_path: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Load or build the index.

        Args:
            indexed: the tokens; each of its sequences is taken as a document.
            documents: consecutive sequence ids that belong to this split.
            spec: the request.
            data_cache_path: where a new index is kept; default: `index-cache` beside the data.
            vocab_size: tokens outside [0, vocab_size) are an error when they are read; None: no upper limit.

        Raises:
            DataError: no documents or tokens, tokens that are no integers, or more passes than int32 can count.
        """
        self.indexed = indexed
        self.spec = spec
        self.vocab_size = vocab_size
        self.description = spec.description(indexed.prefix)
        if indexed.dtype.kind == "f":
            raise DataError(f"{indexed.idx_path} holds {indexed.dtype} values, not tokens")
        lengths = indexed.lengths[documents.start : documents.stop]
        tokens = int(lengths.sum(dtype=np.int64))
        if not tokens:
            mend = "give it data" if spec.split is None else f"give it a larger share in --split {spec.split}"
            raise DataError(
                f"{indexed.prefix}: the {spec.name} split has {len(documents)} of {len(indexed)} documents with "
                f"0 tokens in all; {mend}"
            )
        plan = EpochPlan.make(tokens, spec.seq_length, spec.num_samples)
        if plan.num_epochs * len(documents) > np.iinfo(np.int32).max:
            raise DataError(
                f"{indexed.prefix}: {spec.num_samples} {spec.name} samples take {plan.num_epochs} passes over "
                f"{len(documents)} documents, more visits than the index format can count (2^31 - 1)"
            )
        self._index = load_or_build(self._recipe(documents, plan), cache_directories(indexed.prefix, data_cache_path))

    @property
    def index(self) -> CachedArrays:
        """The arrays `doc_idx`, `sample_idx` and `shuffle_idx`."""
        return self._index

    def __len__(self) -> int:
        return len(self._index["shuffle_idx"])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` (0 ≤ index < len), int64 [seq_length + 1]; DataError at an unreadable or foreign token."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = int(self._index["shuffle_idx"][index])
        (first, begin), (last, end) = self._index["sample_idx"][row : row + 2].tolist()
        pieces = []
        for position in range(first, last + 1):
            document = int(self._index["doc_idx"][position])
            length = int(self.indexed.lengths[document])
            offset = begin if position == first else 0
            stop = end + 1 if position == last else length
            if not 0 <= offset <= stop <= length:
                raise self._cache_error(index)
            tokens = self.indexed.get(document, offset, stop - offset)
            self._check_tokens(tokens, document, offset)
            pieces.append(tokens)
        sample = np.concatenate(pieces, dtype=np.int64)
        if len(sample) != self.spec.seq_length + 1:
            raise self._cache_error(index)
        return sample

    def _cache_error(self, index: int) -> DataError:
        return DataError(
            f"index cache in {self._index.source} does not fit {self.indexed.prefix} at sample {index}: it is damaged, "
            "or the data were replaced during the run; delete the cache to have it built again"
        )

    def _check_tokens(self, tokens: np.ndarray, document: int, offset: int) -> None:
        limit = np.iinfo(np.int64).max if self.vocab_size is None else self.vocab_size
        if not len(tokens) or (int(tokens.max()) < limit and int(tokens.min()) >= 0):
            return
        at = int(np.flatnonzero((tokens < 0) | (tokens >= limit))[0])
        allowed = "at least 0" if self.vocab_size is None else f"in 0..{self.vocab_size - 1}"
        raise DataError(
            f"{self.indexed.bin_path}: token {int(tokens[at])} in document {document} at byte "
            f"{self.indexed.byte_offset(document, offset + at)} is not {allowed}; "
            "the data were made with another tokenizer than this vocabulary, or are damaged"
        )

    def _recipe(self, documents: range, plan: EpochPlan) -> IndexRecipe:
        spec, lengths = self.spec, self.indexed.lengths

        def build() -> Arrays:
            random = np.random.RandomState(seed=spec.seed)  # one stream, documents before samples, as in Megatron
            doc_idx = build_doc_idx(documents, plan, random)
            sample_idx = build_sample_index(lengths, doc_idx, spec.seq_length, plan.num_samples)
            return {
                "doc_idx": doc_idx,
                "sample_idx": sample_idx,
                "shuffle_idx": build_shuffle_idx(plan, random),
            }

        def check(arrays: Arrays) -> None:
            _check_permutation("doc_idx", arrays["doc_idx"], documents, plan.num_epochs, np.int32)
            _check_permutation("shuffle_idx", arrays["shuffle_idx"], range(plan.num_samples), 1, _shuffle_dtype(plan))
            if len(arrays["sample_idx"]) != plan.num_samples + 1:
                raise ValueError(f"sample_idx has {len(arrays['sample_idx'])} rows, not {plan.num_samples + 1}")
            last_token = plan.num_samples * spec.seq_length
            _check_sample_idx(arrays["sample_idx"], arrays["doc_idx"], lengths, last_token)

        return IndexRecipe(self.description, ("doc_idx", "sample_idx", "shuffle_idx"), check, build)


def cache_directories(prefix: str, data_cache_path: str | None) -> list[str]:
    """Where an index of `prefix` may lie, in the order of looking."""
    directories = [os.path.join(os.path.dirname(prefix), CACHE_DIRECTORY)]
    return [*directories, data_cache_path] if data_cache_path else directories


def _check_permutation(name: str, values: np.ndarray, ids: range, copies: int, dtype: type) -> None:
    """Shape, range and sum tell zeros, cuts, other data and nearly all bit flips, without a copy of the array."""
    if values.dtype != dtype or values.shape != (copies * len(ids),):
        raise ValueError(f"{name} is {values.dtype}{values.shape}, not {np.dtype(dtype)}({copies * len(ids)},)")
    total = copies * (ids.start + ids.stop - 1) * len(ids) // 2
    if values.min() < ids.start or values.max() >= ids.stop or int(values.sum(dtype=np.int64)) != total:
        raise ValueError(f"{name} is not a shuffle of {ids.start}..{ids.stop - 1}")


def _check_sample_idx(rows: np.ndarray, doc_idx: np.ndarray, lengths: np.ndarray, last_token: int) -> None:
    """Rows must run forward from the first document to the last sample's last token.

    The end is found by counting tokens, so an index of other data under the same name is noticed. What lies between
    is checked sample by sample when it is read.
    """
    if rows.dtype != np.int32 or rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"sample_idx is {rows.dtype}{rows.shape}, not int32 pairs")
    forward = not rows[0].any() and rows[:, 1].min() >= 0 and rows[-1, 0] < len(doc_idx)
    for start in range(0, len(rows) - 1, CHECK_CHUNK):
        steps = np.diff(rows[start : start + CHECK_CHUNK + 1].astype(np.int64), axis=0)
        forward = forward and bool(np.all((steps[:, 0] > 0) | ((steps[:, 0] == 0) & (steps[:, 1] > 0))))
    if not forward:
        raise ValueError("sample_idx does not run forward through the documents")
    token = int(rows[-1, 1])
    for start in range(0, int(rows[-1, 0]), CHECK_CHUNK):
        token += int(lengths[doc_idx[start : min(start + CHECK_CHUNK, rows[-1, 0])]].sum(dtype=np.int64))
    if token != last_token:
        raise ValueError(f"sample_idx ends at token {token} of these documents, not {last_token}: it is of other data")
