"""Tensors of a Hugging Face directory, read one by one: safetensors, or torch's files through the restricted reader.

Headers are read and checked on opening; what a name's file holds beyond its header is read on demand.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.convert.hf_config import read_json
from megatron.checkpoint.safe import read_legacy
from megatron.checkpoint.typed import mapping
from megatron.errors import CheckpointError

SAFETENSORS, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
EXIT_TENSORS = "exits.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TORCH, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")


class TensorFiles:
    """The tensors of some files by name; `specs` are those of the headers. Raises CheckpointError as `open_model`."""

    def __init__(self, paths: list[Path]) -> None:
        self._from: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: copy the whole directory")
            found = _torch_file(path) if path.suffix == ".bin" else _safetensors_file(path)
            for name, (handle, spec) in found.items():
                if name in self.specs:
                    raise CheckpointError(f"{path} holds {name:.200}, which another file of the directory holds, too")
                self._from[name], self.specs[name] = handle, spec

    def read(self, name: str) -> Tensor:
        """One whole tensor. Raises CheckpointError where its file cannot be read."""
        handle = self._from[name]
        if isinstance(handle, Tensor):
            return handle
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error

    def close(self) -> None:
        """Let go of the files."""
        self._from.clear()


def open_model(directory: Path) -> TensorFiles:
    """All tensors of the model in `directory`, in one file or in those that its index lists; exits' own ones, too.

    Raises:
        CheckpointError: there are none; a file is missing, damaged, cut off, or not in the directory; it holds what is
            no floating-point tensor, or less or more than the index says.
    """
    exits = [directory / EXIT_TENSORS] if (directory / EXIT_TENSORS).exists() else []
    for single, index in ((SAFETENSORS, SHARD_INDEX), (_TORCH, _TORCH_INDEX)):
        if (directory / single).exists():
            return TensorFiles([directory / single, *exits])
        if (directory / index).exists():
            return _sharded(directory / index, exits)
    raise CheckpointError(f"{directory} holds no {SAFETENSORS}, {SHARD_INDEX} or {_TORCH}: copy the whole directory")


def _sharded(index: Path, exits: list[Path]) -> TensorFiles:
    weight_map = mapping(read_json(index), "weight_map", str(index))
    for name in weight_map.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{index}: refused: {name!r:.200} is no name of a file of tensors beside it")
    shards = sorted(set(weight_map.values()))
    files = TensorFiles([*(index.with_name(name) for name in shards), *exits])
    lost = sorted(weight_map.keys() - files.specs.keys())
    if lost:
        raise CheckpointError(f"{index} lists {_some(lost)}, which {weight_map[lost[0]]} doesn't hold")
    return files


def _safetensors_file(path: Path) -> Mapping[str, tuple[Any, TensorSpec]]:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (handle, _spec(path, name, part)) for name, part in slices.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _spec(path: Path, name: str, part: Any) -> TensorSpec:
    dtype = DTYPES.get(part.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name:.200} is of type {part.get_dtype()}, and only {', '.join(DTYPES)} are read"
        )
    return TensorSpec(tuple(part.get_shape()), dtype)


def _torch_file(path: Path) -> Mapping[str, tuple[Tensor, TensorSpec]]:
    found = {}
    for name, tensor in read_legacy(path).items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: {name!r:.200} is no floating-point tensor: write the model anew, with transformers' "
                "save_pretrained(directory, safe_serialization=True)"
            )
        found[name] = (tensor.detach(), TensorSpec(tuple(tensor.shape), tensor.dtype))
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(name[:200] for name in names[:4]) + more
