"""Writes safetensors files tensor by tensor, so that a shard need not fit into memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes of length, a JSON header with type, shape
and span of every tensor, then their bytes, little-endian and without gaps.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron import faults
from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.convert.hf_files import DTYPES
from megatron.checkpoint.manifest import Description
from megatron.errors import CheckpointError

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def size_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def code_of(name: str, spec: TensorSpec) -> str:
    """The format's name of a tensor's type. Raises CheckpointError where it has none that is written."""
    if spec.dtype not in _CODES:
        raise CheckpointError(f"{name} is of type {spec.dtype}, and only {', '.join(_CODES.values())} are written")
    return _CODES[spec.dtype]


def write(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> Description:
    """Write the `tensors`, which come by name in the order of `specs`; returns size and hash of the file.

    Raises OSError where writing fails, CheckpointError where a tensor is not as its spec says.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        begin, end = end, end + size_of(spec)
        header[name] = {"dtype": code_of(name, spec), "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    digest, size = hashlib.sha256(), 0
    faults.point("safetensors.open")
    with path.open("wb") as file:
        stream = faults.watched(file, "safetensors.write")
        for block in _blocks(len(text).to_bytes(8, "little") + text, specs, tensors):
            stream.write(block)
            digest.update(block)
            size += len(block)
    return {"sha256": digest.hexdigest(), "size": size}


def _blocks(head: bytes, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> Iterable:
    yield head
    for (name, spec), (given, tensor) in zip(specs.items(), tensors, strict=True):
        if given != name or TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
            raise CheckpointError(f"{given} came as {list(tensor.shape)}, not {name} of {list(spec.shape)}")
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data
