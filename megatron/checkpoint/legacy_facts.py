"""What a legacy checkpoint says beside its tensors, as JSON-able data: optimizer's step, scheduler, loss scaler.

A scheduler or scaler that lacks keys is left out with a warning; a value of a wrong type is an error.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from megatron.checkpoint.legacy_optimizer import counts_steps, optimizer_step
from megatron.checkpoint.safe import EnumMember, Namespace
from megatron.checkpoint.typed import count, number, text
from megatron.errors import CheckpointError
from megatron.logs import get_logger

# hysteresis_tracker sinks below 0 while overflows go on.
_SCALER = {"scale": number, "growth_tracker": count, "hysteresis_tracker": number}
_SCHEDULER = {
    "max_lr": number,
    "min_lr": number,
    "lr_decay_style": text,
    "lr_decay_steps": number,
    "lr_warmup_steps": number,
    "num_steps": count,
    "start_wd": number,
    "end_wd": number,
    "wd_incr_style": text,
    "wd_incr_steps": number,
}

_MOST_VALUES = 1_000_000
_DEEPEST = 50
_log = get_logger(__name__)


def scheduler_facts(state: Any, where: str) -> dict[str, Any] | None:
    """State of learning rate and weight decay; None where the file (older than today's names, or a release) has none.

    Raises:
        CheckpointError: a value is of a wrong type.
    """
    return _checked("opt_param_scheduler", state, _SCHEDULER, where)


def optimizer_facts(state: Mapping[str, Any], iteration: int, where: str) -> dict[str, Any]:
    """The facts optimizer_step and grad_scaler (None if loss isn't scaled) of a state that `optimizer_parts` took.

    SGD counts no steps: its step is the iteration.

    Raises:
        CheckpointError: Adam's step is missing, or a value is of a wrong type.
    """
    step = optimizer_step(state, where)
    if step is None and counts_steps(state):
        raise CheckpointError(
            f"{where}: the optimizer's state lacks step: give --no-load-optim or --finetune to take the weights alone"
        )
    scaler = _checked("grad_scaler", state.get("grad_scaler"), _SCALER, where)
    return {"optimizer_step": iteration if step is None else step, "grad_scaler": scaler}


def _checked(name: str, state: Any, getters: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """All of `state` if each key of `getters` is there with its type; None if some are missing."""
    if state is None or state == {}:
        return None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where}: {name} is a {type(state).__name__}, not a mapping: the checkpoint is damaged")
    if lacking := [key for key in getters if state.get(key) is None]:
        _log.warning("%s: %s lacks %s and is left out", where, name, ", ".join(lacking))
        return None
    for key, getter in getters.items():
        getter(state, key, f"{where}, {name}")
    return json_able(state, where)


def json_able(value: Any, where: str) -> Any:
    """Plain data of what a Namespace, a scheduler or a scaler holds; names of types and enumerations as text.

    Raises:
        CheckpointError: it holds itself, or far more than such things do.
    """
    return _plain(value, where, itertools.count(1), 0)


def _plain(value: Any, where: str, counted: Iterator[int], depth: int) -> Any:
    size = value.numel() if isinstance(value, Tensor) else 0
    if next(counted) > _MOST_VALUES or size > _MOST_VALUES or depth > _DEEPEST:
        raise CheckpointError(f"{where}: refused: its arguments hold themselves, or far more values than arguments do")

    def inner(item: Any) -> Any:
        return _plain(item, where, counted, depth + 1)

    if isinstance(value, Namespace):
        return inner(vars(value))
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.item() if size == 1 else value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return repr(value) if isinstance(value, EnumMember) else str(value).removeprefix("torch.")
    return [inner(item) for item in value]
