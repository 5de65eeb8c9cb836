"""Values out of a checkpoint's untyped mappings, checked one by one.

Each function takes the mapping, the key and `where` (the file or directory that errors name).
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron.errors import CheckpointError


def count(data: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number from 0; a tensor that holds one will do, of floats too: PyTorch keeps an optimizer's step so.

    Raises:
        CheckpointError: the key is missing, or its value is something else.
    """
    value = number(data, key, where)
    if value < 0 or value != int(value) or isinstance(data[key], float):
        raise _wrong(value, key, "a whole number from 0", where)
    return int(value)


def number(data: Mapping[str, Any], key: str, where: str) -> int | float:
    """A finite number, alone or in a tensor of one element; integers below 2^63. Errors as for `count`."""
    value = _present(data, key, where)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    limit = 2**63 if isinstance(value, int) else math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < limit:  # nan neither
        raise _wrong(value, key, "a number", where)
    return value


def text(data: Mapping[str, Any], key: str, where: str) -> str:
    """A string. Errors as for `count`."""
    value = _present(data, key, where)
    if not isinstance(value, str):
        raise _wrong(value, key, "text", where)
    return value


def mapping(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A nested mapping. Errors as for `count`."""
    value = _present(data, key, where)
    if not isinstance(value, Mapping):
        raise _wrong(value, key, "a mapping", where)
    return value


def sequence(data: Mapping[str, Any], key: str, where: str) -> list[Any] | tuple[Any, ...]:
    """A list or tuple of anything. Errors as for `count`."""
    value = _present(data, key, where)
    if not isinstance(value, list | tuple):
        raise _wrong(value, key, "a list", where)
    return value


def _present(data: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise CheckpointError(f"{where} lacks {key}: the checkpoint is damaged or not of a version that is read")
    return data[key]


def _wrong(value: Any, key: str, kind: str, where: str) -> CheckpointError:
    shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return CheckpointError(f"{where}: {key} is {shown:.80}, not {kind}: the checkpoint is damaged")
