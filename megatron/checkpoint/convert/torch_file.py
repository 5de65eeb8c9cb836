"""A file as torch.save writes it, of which never more than one tensor is in memory.

torch.save wants all tensors at once. Here it gets fake ones for the file's index, and their numbers follow one by one.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import DEFAULT_PROTOCOL, skip_data

from megatron import faults
from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.dcp_files import Hashed
from megatron.checkpoint.manifest import Description
from megatron.errors import StorageError


class TorchFile:
    """`content` is of plain values in dictionaries, with a TensorSpec where a tensor belongs.

    Call `write` once for each of these, in their order; then `close`. Raises StorageError where the disk is full or
    read-only.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        index = _Index()
        with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
            # what torch.save does with a file of its own
            torch.serialization._save(_faked(content), index, torch.serialization.pickle, DEFAULT_PROTOCOL, False)
        self.path, self._left = path, index.tensors[::-1]
        self._ending, self._stream = ExitStack(), None
        try:
            faults.point("legacy.open")
            file = self._ending.enter_context(path.open("wb"))
            self._stream = Hashed(faults.watched(file, "legacy.write"), lambda: None)
            self._writer = torch._C.PyTorchFileWriter(self._stream)
            self._ending.callback(self._writer.write_end_of_file)  # else its destructor does, where no error may be
            for name, data in index.records:
                self._writer.write_record(name, data, len(data))
        except (OSError, RuntimeError) as error:
            failed = self._failed(error)
            self.abandon()
            raise failed from error

    def write(self, tensor: Tensor) -> None:
        """The next tensor. It is of the shape and type that were said."""
        name, size = self._left.pop()
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != size:
            tensor = tensor.clone()  # a view of more
        assert tensor.nbytes == size, f"{name}: {tensor.nbytes} bytes, not {size}"
        try:
            self._writer.write_record(name, tensor.untyped_storage(), size)
        except (OSError, RuntimeError) as error:
            raise self._failed(error) from error

    def close(self) -> Description:
        """End the file; returns its size and hash."""
        assert not self._left, f"tensors are missing: {self._left[-1][0]}"
        try:
            self._ending.close()
        except (OSError, RuntimeError) as error:
            raise self._failed(error) from error
        return self._stream.description()

    def abandon(self) -> None:
        """Close what is to be removed; nothing where it is closed already."""
        with suppress(OSError, RuntimeError):
            self._ending.close()

    def _failed(self, error: Exception) -> StorageError:
        failure = self._stream.failure if self._stream is not None else None  # torch's writer hides what the file said
        return StorageError(f"cannot write {self.path}: {failure or error}")


class _Index:
    """Takes what torch would put into a file: small records, and of tensors their places."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str | bytes]] = []
        self.tensors: list[tuple[str, int]] = []

    def write_record(self, name: str, data: str | bytes, size: int) -> None:
        assert len(data) == size
        self.records.append((name, data))

    def write_record_metadata(self, name: str, size: int) -> None:
        self.tensors.append((name, size))


def _faked(content: Any) -> Any:
    """The same with fake tensors in place of what is known of them; dictionaries keep their order."""
    if isinstance(content, TensorSpec):
        return torch.empty(content.shape, dtype=content.dtype)
    if isinstance(content, Mapping):
        return type(content)((key, _faked(value)) for key, value in content.items())
    return content
