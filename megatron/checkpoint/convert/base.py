"""What every format offers to a conversion: a model somewhere, read tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.config.run import RunConfig


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(Protocol):
    """A model in some format. `facts`: JSON facts worth carrying; {} where there are none."""

    config: RunConfig  # model, exits and tokenizer filled; others default or as stored
    iteration: int
    facts: dict[str, Any]

    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors by native name (megatron/model/names.py), in layer order."""

    def read(self, name: str) -> Tensor:
        """One whole tensor on the CPU, in its stored dtype."""

    def tokenizer_files(self) -> list[Path]:
        """Files to be carried along; [] where there are none."""

    def close(self) -> None:
        """Let go of open files."""
