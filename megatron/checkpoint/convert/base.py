"""What a converter's parts agree on: a source is a model somewhere, read tensor by tensor; a writer streams one.

Tensors have native names (model/names.py: whole, whatever the layout; gate and up apart). `<name>.padding` are the rows
beyond the vocabulary, where a source has any; a format that pads in another way passes them over.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron.config.run import RunConfig
from megatron.errors import StorageError


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Source(Protocol):
    """A model somewhere. Reading may come from several threads at once.

    config: its sections model, exits and tokenizer are of this model; the others as stored, or defaults.
    facts: JSON facts worth carrying along (consumed_samples, args, …); {} where there are none.
    """

    config: RunConfig
    iteration: int
    facts: dict[str, Any]

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors of the model by native name, in the order of the layers."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in its stored type. Raises CheckpointError where it is damaged."""

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, to be carried along; [] where there are none."""

    def close(self) -> None:
        """Give back what was opened."""


@runtime_checkable
class Trained(Source, Protocol):
    """A source that has the optimizer's state, too: `read` takes its names, as RunState has them."""

    def moments(self) -> Mapping[str, TensorSpec]:
        """`optimizer/<kind>/<parameter>` -> what is known of it; empty where nothing was saved."""

    def training_facts(self) -> dict[str, Any]:
        """The facts optimizer_step, grad_scaler and opt_param_scheduler that go with it."""


@dataclass(frozen=True)
class Layout:
    """How a target is cut, where its format is: tp and pp; None: as the source was, else 1."""

    tp: int | None = None
    pp: int | None = None


def check_free(place: Path) -> None:
    """A conversion replaces nothing. Raises StorageError where something is at `place`."""
    if place.exists() or place.is_symlink():
        raise StorageError(f"{place} exists and is not replaced: give another --save-dir, or move it away")


Check = Callable[[Path], None]
"""Called with the whole target just before it becomes visible; raises CheckpointError to give it up."""

Writer = Callable[[Source, Path, Layout, Check], Path]
"""`write(source, root, layout, check)`: streams all tensors of `source` into a checkpoint below `root`, through
commit.py, so that `root` is as it was where anything raises; returns the checkpoint's directory.

Raises CheckpointError where the source is damaged, ConfigError where the format can't hold it, StorageError where it
can't be written.
"""
