"""The two index arrays that are built by walking: sample starts and the order of a blend.

A small C++ extension does it where it was compiled; numpy does it elsewhere, more slowly, with identical results.
"""

import functools
import importlib
from types import ModuleType

import numpy as np

from megatron.logs import get_logger

logger = get_logger(__name__)


@functools.cache  # asked once a process, so the notice appears once
def compiled_builder() -> ModuleType | None:
    """The C++ extension, or None where the package was installed without a compiler."""
    try:
        return importlib.import_module("megatron.data._index_builder")
    except ImportError:
        logger.info("megatron.data._index_builder is not compiled: indices are built by numpy (same result, slower)")
        return None


def build_sample_index(lengths: np.ndarray, doc_idx: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """Where each sample starts: int32 [num_samples + 1, 2] of (position in doc_idx, token offset).

    Args:
        lengths: int32 [S], tokens of every sequence.
        doc_idx: int32, sequence ids in the order in which they are read.
        seq_length: sample i starts at token i * seq_length of that concatenation.
        num_samples: the last row is the place of the last token of the last sample, which must exist.
    """
    lengths = np.require(lengths, np.int32, ["C", "A"])  # a mapped index is not aligned
    builder = compiled_builder()
    if builder is not None:
        return builder.sample_index(lengths, np.require(doc_idx, np.int32, ["C", "A"]), seq_length, num_samples)
    return numpy_sample_index(lengths, doc_idx, seq_length, num_samples)


def numpy_sample_index(lengths: np.ndarray, doc_idx: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """`build_sample_index` by binary search in the running token count."""
    ends = np.cumsum(lengths[doc_idx], dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    if not len(ends) or tokens[-1] >= ends[-1]:
        raise ValueError("the documents hold too few tokens")
    positions = np.searchsorted(ends, tokens, side="right")  # empty documents hold no token and are passed over
    offsets = tokens - np.where(positions > 0, ends[positions - 1], 0)
    index = np.stack([positions, offsets], axis=1).astype(np.int32)
    index[0] = 0  # the first sample starts at the first document even if that one is empty, as in Megatron
    return index


def build_blend(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of a blend of D datasets: (dataset of sample i int16 [size], sample within it int64 [size]).

    Sample i comes from the dataset whose count lags most behind its share: the largest
    weights[d] * max(i, 1) - count[d], the lowest d on ties. `weights`: float64 [D], summing to 1.
    """
    weights = np.require(weights, np.float64, ["C", "A"])
    builder = compiled_builder()
    return builder.blend(weights, size) if builder is not None else numpy_blend(weights, size)


def numpy_blend(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`build_blend`, one numpy step a sample."""
    counts = np.zeros(len(weights), np.int64)
    dataset_index = np.empty(size, np.int16)
    sample_index = np.empty(size, np.int64)
    for i in range(size):
        chosen = int(np.argmax(weights * max(i, 1) - counts))
        dataset_index[i] = chosen
        sample_index[i] = counts[chosen]
        counts[chosen] += 1
    return dataset_index, sample_index
