"""Sources made of others: some tensors new, renamed or cut. And one that watches what is read."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint import legacy_names as names
from megatron.checkpoint.convert.base import Source, TensorSpec, Trained
from megatron.checkpoint.state import PADDING
from megatron.config.run import RunConfig
from megatron.errors import CheckpointError


class Origin(NamedTuple):
    """Where a tensor comes from."""

    spec: TensorSpec
    read: Callable[[], Tensor]


def origins(source: Source) -> dict[str, Origin]:
    """All tensors of a source, as they are."""
    return {name: copy_of(source, name, spec) for name, spec in source.specs().items()}


def copy_of(source: Source, name: str, spec: TensorSpec | None = None) -> Origin:
    """A tensor of a source."""
    return Origin(spec or source.specs()[name], lambda: source.read(name))


class Derived:
    """`source` with another config and other tensors. It closes `source` with itself."""

    def __init__(
        self,
        source: Source,
        config: RunConfig,
        tensors: Mapping[str, Origin],
        moments: Mapping[str, Origin] | None = None,
    ) -> None:
        self.config, self.iteration, self.facts = config, source.iteration, source.facts
        self._source, self._tensors, self._moments = source, tensors, moments or {}

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors of the model."""
        return {name: origin.spec for name, origin in self._tensors.items()}

    def moments(self) -> Mapping[str, TensorSpec]:
        """The optimizer's tensors, where they still belong to the parameters."""
        return {name: origin.spec for name, origin in self._moments.items()}

    def training_facts(self) -> dict[str, Any]:
        """Those of the source, where there are moments."""
        return self._source.training_facts() if self._moments and isinstance(self._source, Trained) else {}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return (self._tensors.get(name) or self._moments[name]).read()

    def tokenizer_files(self) -> list[Path]:
        """Those of the source."""
        return self._source.tokenizer_files()

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def split_vocabulary(source: Source, vocab_size: int, config: RunConfig) -> Derived:
    """`source` with the rows beyond the vocabulary apart; those that are apart already stay so.

    Raises:
        CheckpointError: a matrix has fewer rows than the tokenizer has ids.
    """
    found = moments(source)
    return Derived(source, config, _split(origins(source), vocab_size), _split(found, vocab_size))


def moments(source: Source) -> dict[str, Origin]:
    """The optimizer's tensors of a source that has any."""
    specs = source.moments() if isinstance(source, Trained) else {}
    return {name: copy_of(source, name, spec) for name, spec in specs.items()}


def _split(tensors: Mapping[str, Origin], vocab_size: int) -> dict[str, Origin]:
    split: dict[str, Origin] = {}
    for name, origin in tensors.items():
        if not names.has_vocabulary(name):
            split[name] = origin
            continue
        (rows, *rest), dtype = origin.spec.shape, origin.spec.dtype
        if rows < vocab_size:
            raise CheckpointError(
                f"{name} has {rows} rows, the tokenizer {vocab_size} ids: give the tokenizer that the model was "
                "trained with"
            )
        split[name] = Origin(TensorSpec((vocab_size, *rest), dtype), _rows(origin.read, slice(None, vocab_size)))
        if rows > vocab_size:
            beyond = TensorSpec((rows - vocab_size, *rest), dtype)
            split[name + PADDING] = Origin(beyond, _rows(origin.read, slice(vocab_size, None)))
    return split


def _rows(read: Callable[[], Tensor], rows: slice) -> Callable[[], Tensor]:
    return lambda: read()[rows]


class Watched(Derived):
    """`source`, of which every tensor's hash is kept when it is first read; `on_read` is told its size in bytes."""

    def __init__(self, source: Source, on_read: Callable[[int], None]) -> None:
        super().__init__(source, source.config, origins(source), moments(source))
        self.hashes: dict[str, str] = {}
        self._on_read, self._lock = on_read, Lock()

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        tensor = super().read(name)
        if name not in self.hashes:
            digest = fingerprint(tensor)
            with self._lock:
                if name not in self.hashes:
                    self._on_read(tensor.nbytes)
                self.hashes[name] = digest
        return tensor


def fingerprint(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes, its shape and type."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
