"""The mesh of ranks as a value: axes dp, pp, tp, asked by name, built once and passed down.

Rank order is Megatron's: tp fastest, then dp, then pp. This version has one rank; code above already asks the
mesh, so larger sizes only fill in `group` and `peer`.
"""

import os
from dataclasses import dataclass

from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError
from megatron.parallel.backend import Backend

AXES = ("dp", "pp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Sizes and this rank's coordinates along the axes dp, pp, tp, and the backend they run on."""

    backend: Backend
    sizes: tuple[int, int, int] = (1, 1, 1)
    ranks: tuple[int, int, int] = (0, 0, 0)

    @staticmethod
    def build(config: ParallelConfig, backend: Backend) -> "Mesh":
        """Make the mesh of this process. Raises ConfigError where several processes were launched."""
        world = os.environ.get("WORLD_SIZE", "1")
        if world != "1":
            raise ConfigError(
                f"{world} processes were launched, but this version trains on one: "
                "start it without torchrun, or with --nproc-per-node 1"
            )
        sizes = (1, config.pipeline_model_parallel_size, config.tensor_model_parallel_size)
        assert sizes == (1, 1, 1), "config rules refuse parallel sizes above 1"
        return Mesh(backend, sizes)

    def size(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.sizes[AXES.index(axis)]

    def rank(self, axis: str) -> int:
        """This process's coordinate along `axis`."""
        return self.ranks[AXES.index(axis)]

    def place(self) -> str:
        """This process's coordinates in words, for messages."""
        return " ".join(f"{axis}={rank}" for axis, rank in zip(AXES, self.ranks, strict=True))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes logs."""
        return self.ranks == (0, 0, 0)
