"""The facts of a native checkpoint that training goes on from: every key there, every value of its type."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint import native
from megatron.checkpoint.find import FACTS
from megatron.checkpoint.typed import count, mapping, number, text
from megatron.errors import CheckpointError

Getter = Callable[[Mapping[str, Any], str, str], Any]

_RUN: dict[str, Getter] = {
    "config": mapping,
    "tokenizer": text,
    "iteration": count,
    "consumed_samples": count,
    "optimizer_samples": count,
    "optimizer_step": count,
    "skipped_steps": count,
    "run": count,
    "grad_scaler": mapping,
    "opt_param_scheduler": mapping,
}
# hysteresis_tracker sinks below 0 while overflows go on.
_SCALER: dict[str, Getter] = {"scale": number, "growth_tracker": count, "hysteresis_tracker": number}
# The fields of megatron/optim/lr.py, which this layer doesn't know.
_SCHEDULES: dict[str, dict[str, Getter]] = {
    "learning_rate": {
        "max_lr": number,
        "min_lr": number,
        "style": text,
        "decay_samples": number,
        "warmup_samples": number,
        "init_lr": number,
        "wsd_style": text,
        "wsd_decay_samples": number,
    },
    "weight_decay": {"start": number, "end": number, "style": text, "length": number},
}


def read_run_facts(directory: Path) -> dict[str, Any]:
    """The facts of a native checkpoint that a run saved, checked. Errors as for `read_facts` and `check_run_facts`."""
    facts = native.read_facts(directory)
    check_run_facts(facts, directory)
    return facts


def check_run_facts(facts: Mapping[str, Any], directory: Path) -> None:
    """Hold facts against what a run saves. Keys beyond it are let be, except in the schedules.

    Raises:
        CheckpointError: a key is missing, its value is of another type, or a schedule has a key that this program
            doesn't know: it would be followed wrongly.
    """
    where = str(directory / FACTS)
    _check(facts, _RUN, where)
    count({"good": 0} | facts, "good", where)  # checkpoints of before have none
    mapping(facts["config"], "model", f"{where}, config")
    _check(facts["grad_scaler"], _SCALER, f"{where}, grad_scaler")
    schedules = facts["opt_param_scheduler"]
    for name, getters in _SCHEDULES.items():
        inside = f"{where}, opt_param_scheduler.{name}"
        schedule = mapping(schedules, name, f"{where}, opt_param_scheduler")
        _check(schedule, getters, inside)
        if unknown := sorted(schedule.keys() - getters.keys()):
            raise CheckpointError(f"{inside} has {', '.join(unknown)}, which this program doesn't know: update it")


def _check(data: Mapping[str, Any], getters: Mapping[str, Getter], where: str) -> None:
    for key, getter in getters.items():
        getter(data, key, where)
