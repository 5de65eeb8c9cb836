"""Weighted mixtures of datasets: sharing out a request, and the blended order.

How the flags spell a mixture is config/mixture.py's.
"""

import functools
import math
import operator
from collections.abc import Sequence

import numpy as np

from megatron.data.gpt import GPTDataset
from megatron.data.index_builder import build_blend
from megatron.data.index_cache import Arrays, CachedArrays, IndexRecipe, load_or_build

OVERDRAW = 1.005  # each dataset is asked for half a percent more than its share


def normalised(weights: Sequence[float]) -> list[float]:
    """`weights` divided by their sum, added from left to right: other orders round otherwise than Megatron."""
    total = functools.reduce(operator.add, weights, 0.0)
    return [weight / total for weight in weights]


def requests(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Samples to ask of each dataset so that a blend of `num_samples` is covered."""
    return [math.ceil(num_samples * weight * OVERDRAW) for weight in weights]


class BlendedDataset:
    """Map-style dataset that interleaves others by weight; `size` samples, int64 [seq_length + 1] each."""

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float],
        size: int,
        data_cache_path: str | None = None,
    ) -> None:
        """Load or build the order; it is kept on disk only where `data_cache_path` is given."""
        self.datasets = list(datasets)
        self.size = size
        shares = np.array(weights, dtype=np.float64)
        shares /= np.sum(shares)
        self.description = self._description(shares)
        recipe = IndexRecipe(
            self.description, ("index", "sample_index"), self._check, functools.partial(_build, shares, size)
        )
        self._index = load_or_build(recipe, [data_cache_path] if data_cache_path else [])

    @property
    def index(self) -> CachedArrays:
        """The arrays `index` (dataset) and `sample_index` (sample in it)."""
        return self._index

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        dataset = self.datasets[int(self._index["index"][index])]
        # `size` exceeds the request by rounding; only in that surplus can a small dataset run out, and it starts again.
        return dataset[int(self._index["sample_index"][index]) % len(dataset)]

    def _description(self, shares: np.ndarray) -> str:
        # As str() prints it unless told otherwise: part of the name, so it must not follow the user's print options.
        weights = np.array2string(
            shares,
            max_line_width=75,
            precision=8,
            suppress_small=False,
            threshold=1000,
            edgeitems=3,
            floatmode="maxprec",
        )
        members = "".join(dataset.description + "\n\n" for dataset in self.datasets)
        return f"Blendable dataset\n\nDatasets:\n{members}Weights: {weights}\nSize: {self.size}\n"

    def _check(self, arrays: Arrays) -> None:
        index, sample_index = arrays["index"], arrays["sample_index"]
        for name, array, dtype in (("index", index, np.int16), ("sample_index", sample_index, np.int64)):
            if array.dtype != dtype or array.shape != (self.size,):
                raise ValueError(f"{name} is {array.dtype}{array.shape}, not {np.dtype(dtype)}({self.size},)")
        if index.min() < 0 or index.max() >= len(self.datasets):
            raise ValueError(f"index names datasets beyond the {len(self.datasets)} there are")
        counts = np.bincount(index, minlength=len(self.datasets))
        # Dataset d gives its samples 0, 1, … in order, so their sum follows from how many it gives.
        sums = np.bincount(index, weights=sample_index, minlength=len(self.datasets))
        if sample_index.min() < 0 or not np.array_equal(sums, counts * (counts - 1.0) / 2):
            raise ValueError("sample_index does not count through each dataset")


def _build(shares: np.ndarray, size: int) -> Arrays:
    index, sample_index = build_blend(shares, size)
    return {"index": index, "sample_index": sample_index}
