"""Which samples a microbatch holds: pure functions of (order, seed, consumed samples), so any resume is exact.

`consumed_samples` counts over all data-parallel ranks. Rank r takes the r-th slice of each group of
micro_batch_size * dp_size samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron.errors import ConfigError


@dataclass(frozen=True)
class BatchOrder:
    """One rank's place in the stream of samples; raises ConfigError for values that make no sense."""

    micro_batch_size: int
    consumed_samples: int = 0
    dp_rank: int = 0
    dp_size: int = 1
    dataloader_type: Literal["single", "cyclic"] = "single"
    seed: int = 1234  # cyclic only
    data_sharding: bool = True  # cyclic only: each rank permutes its own part of the data

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size {self.micro_batch_size}: must be at least 1")
        if self.consumed_samples < 0:
            raise ConfigError(f"{self.consumed_samples} consumed samples: must be at least 0")
        if not 0 <= self.dp_rank < self.dp_size:
            raise ConfigError(f"data-parallel rank {self.dp_rank} of {self.dp_size}")
        if self.dataloader_type not in ("single", "cyclic"):
            raise ConfigError(f"--dataloader-type {self.dataloader_type}: choose single or cyclic")
        if self.dataloader_type == "cyclic" and self.data_sharding and self.consumed_samples % self.dp_size:
            raise ConfigError(
                f"{self.consumed_samples} consumed samples are not a multiple of dp={self.dp_size}, so the shards "
                "have no common place to go on from; use --no-data-sharding"
            )


def microbatches(num_samples: int, order: BatchOrder) -> Iterator[list[int]]:
    """Yield the sample indices of this rank's microbatches, from `order.consumed_samples` on.

    single: consecutive indices; ends where no full group for all ranks is left (a partial tail is dropped).
    cyclic: endless passes, each a fresh permutation; a microbatch may end one pass and begin the next.
    """
    if order.dataloader_type == "single":
        return _single(num_samples, order)
    return _cyclic(num_samples, order)


def _single(num_samples: int, order: BatchOrder) -> Iterator[list[int]]:
    group = order.micro_batch_size * order.dp_size
    for start in range(order.consumed_samples, num_samples - group + 1, group):
        mine = start + order.dp_rank * order.micro_batch_size
        yield list(range(mine, mine + order.micro_batch_size))


def _cyclic(num_samples: int, order: BatchOrder) -> Iterator[list[int]]:
    """Position p of an endless stream is sample `permutation(seed + p // size)[p % size]`.

    Unsharded there is one stream, cut among ranks as in `single`, so it does not depend on batch sizes.
    Sharded each rank has a stream over its own consecutive num_samples // dp_size samples.
    """
    micro, ranks = order.micro_batch_size, order.dp_size
    if order.data_sharding:
        size, position, stride = num_samples // ranks, order.consumed_samples // ranks, micro
        shard_start = order.dp_rank * size
    else:
        size, stride, shard_start = num_samples, micro * ranks, 0
        position = order.consumed_samples + order.dp_rank * micro
    if size < 1:
        raise ConfigError(f"{num_samples} samples cannot be shared among dp={ranks} ranks; use --no-data-sharding")
    current, permutation = -1, np.empty(0, np.int64)
    while True:
        batch = []
        for place in range(position, position + micro):
            if place // size != current:
                current = place // size
                permutation = np.random.RandomState((order.seed + current) % 2**32).permutation(size)
            batch.append(shard_start + int(permutation[place % size]))
        yield batch
        position += stride
