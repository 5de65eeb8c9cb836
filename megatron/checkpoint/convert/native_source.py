"""A native checkpoint as a converter's source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint import native
from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.find import FACTS, NATIVE, Found
from megatron.checkpoint.state import MODEL, OPTIMIZER
from megatron.checkpoint.stored_run import stored_config
from megatron.checkpoint.typed import count
from megatron.errors import CheckpointError

_OF_FORMAT = ("format", "format_version", "tokenizer_sha256", "iteration")


class NativeSource:
    """Reads `directory`, whose manifest was verified or which is just being written.

    Raises:
        CheckpointError: facts or index are missing or damaged, or the tokenizer's files changed.
        ConfigError: the stored config breaks a rule.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._tensors = directory, native.Tensors(directory)
        facts = native.read_facts(directory)
        self.iteration = count(facts, "iteration", str(directory / FACTS))
        self.facts: dict[str, Any] = {name: value for name, value in facts.items() if name not in _OF_FORMAT}
        self.config = stored_config(Found(directory, self.iteration, NATIVE))
        if not any(name.startswith(MODEL) for name in self._tensors.index):
            raise CheckpointError(f"{directory} holds no model")

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors of the model."""
        return self._with_prefix(MODEL, len(MODEL))

    def moments(self) -> Mapping[str, TensorSpec]:
        """The optimizer's tensors."""
        return self._with_prefix(OPTIMIZER, 0)

    def training_facts(self) -> dict[str, Any]:
        """None beyond `facts`, which hold them already."""
        return {}

    def read(self, name: str) -> Tensor:
        """One whole tensor of the model, or (`optimizer/…`) of the optimizer."""
        return self._tensors.read(name if name.startswith(OPTIMIZER) else MODEL + name)

    def tokenizer_files(self) -> list[Path]:
        """The copies inside the checkpoint."""
        return list(native.tokenizer_files(self._directory).values())

    def close(self) -> None:
        """Nothing stays open."""

    def _with_prefix(self, prefix: str, cut: int) -> dict[str, TensorSpec]:
        return {
            name[cut:]: TensorSpec(shape, dtype)
            for name, (shape, dtype) in self._tensors.index.items()
            if name.startswith(prefix)
        }
