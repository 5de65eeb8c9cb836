"""Which parameter each entry of a legacy optimizer's state belongs to: entries are numbered, not named.

Numbers follow the order in which the original's modules registered their parameters, weights that decay first;
every assignment is verified against the parameters' shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.checkpoint.legacy_names import TIED_COPY
from megatron.checkpoint.typed import count, mapping, sequence
from megatron.errors import CheckpointError

_KINDS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_NO_OPTIMIZER = "Give --no-load-optim or --finetune to take the weights alone"

Key = tuple[int, str]
"""(chunk of an interleaved pipeline, legacy name)."""


@dataclass(frozen=True)
class Numbered:
    """An optimizer's state by number: of each group its parameters' numbers, of each number its moments by kind."""

    groups: list[list[int]]
    moments: dict[int, dict[str, Tensor]]


def optimizer_parts(
    state: Any, parameters: Mapping[Key, Tensor], early_exit: bool, tune_exit: bool, where: str
) -> dict[str, dict[Key, Tensor]]:
    """Moments and fp32 masters of one rank by kind ("exp_avg", …, "master") and parameter.

    `parameters` are the rank's, in the order of its file. With `tune_exit` only those of exits were trained.

    Raises:
        CheckpointError: the state is not of a kind we know or does not fit the parameters.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: there is no optimizer state. {_NO_OPTIMIZER}")
    inner = _numbered(state, where)
    trained = [key for key in parameters if not tune_exit or "exit" in key[1] or ".branch." in key[1]]
    masters = state.get("fp32_from_fp16_params")
    orders = [_early_exit_order(trained), _plain_order(trained)]
    for order in orders if early_exit else reversed(orders):
        groups = _decay_groups(order, parameters)
        if _fits(inner, groups, parameters):
            found = _moments(inner, groups)
            return found if masters is None else found | {"master": _masters(masters, groups, parameters, where)}
    raise CheckpointError(f"{where}: the optimizer's state belongs to other parameters. {_NO_OPTIMIZER}")


def optimizer_step(state: Mapping[str, Any], where: str) -> int | None:
    """The number of updates an optimizer has made, from its groups or its first entry; None if it doesn't say.

    `state` is one that `optimizer_parts` took.

    Raises:
        CheckpointError: the number isn't one.
    """
    inner = state.get("optimizer", state)
    for holder in [*inner["param_groups"], *inner["state"].values()]:
        if "step" in holder:
            return count(holder, "step", f"{where}, optimizer")
    return None


def counts_steps(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer that `optimizer_parts` took is of the Adam family, whose update depends on its step."""
    return any("exp_avg" in entry for entry in state.get("optimizer", state)["state"].values())


def _numbered(state: Mapping[str, Any], where: str) -> Numbered:
    """The inner optimizer's own state (mixed precision wraps it), taken apart."""
    inner = mapping(state, "optimizer", where) if "optimizer" in state else state
    where = f"{where}, optimizer"
    groups = sequence(inner, "param_groups", where)
    if not all(isinstance(group, Mapping) for group in groups):
        raise CheckpointError(f"{where}: param_groups are no mappings: the checkpoint is damaged")
    if "state" not in inner or not all("params" in group for group in groups):
        raise CheckpointError(f"{where}: the optimizer's state is sharded and is not read. {_NO_OPTIMIZER}")
    moments: dict[int, dict[str, Tensor]] = {}
    for number, entry in mapping(inner, "state", where).items():
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{where}: entry {number} is no mapping: the checkpoint is damaged")
        moments[number] = {kind: entry[kind] for kind in _KINDS if entry.get(kind) is not None}
        if not all(isinstance(tensor, Tensor) for tensor in moments[number].values()):
            raise CheckpointError(f"{where}: entry {number} holds a moment that is no tensor")
    numbers = [list(sequence(group, "params", where)) for group in groups]
    if not all(isinstance(number, int) for group in numbers for number in group):
        raise CheckpointError(f"{where}: params are no numbers: the checkpoint is damaged")
    return Numbered(numbers, moments)


def _early_exit_order(keys: list[Key]) -> list[Key]:
    """The early-exit model registers its output weight (the tied copy, if it has one) before everything else."""
    ranks = {TIED_COPY: 0, "output_layer.weight": 0}
    return sorted(keys, key=lambda key: 2 if key[1].startswith("exit_output_layer.") else ranks.get(key[1], 1))


def _plain_order(keys: list[Key]) -> list[Key]:
    """The model without exits registers as its file is written: the output weight or tied copy last."""
    return sorted(keys, key=lambda key: (key[0], key[1] in ("output_layer.weight", TIED_COPY)))


def _decay_groups(order: list[Key], parameters: Mapping[Key, Tensor]) -> list[list[Key]]:
    """Weights decay, biases and vectors don't; a group without members is not kept."""
    groups: tuple[list[Key], list[Key]] = ([], [])
    for key in order:
        groups[key[1].endswith(".bias") or parameters[key].dim() == 1].append(key)
    return [group for group in groups if group]


def _fits(inner: Numbered, groups: list[list[Key]], parameters: Mapping[Key, Tensor]) -> bool:
    if [len(group) for group in inner.groups] != [len(group) for group in groups]:
        return False
    return all(
        tensor.shape == parameters[key].shape
        for numbers, keys in zip(inner.groups, groups, strict=True)
        for number, key in zip(numbers, keys, strict=True)
        for tensor in inner.moments.get(number, {}).values()
    )


def _moments(inner: Numbered, groups: list[list[Key]]) -> dict[str, dict[Key, Tensor]]:
    found: dict[str, dict[Key, Tensor]] = {}
    for numbers, keys in zip(inner.groups, groups, strict=True):
        for number, key in zip(numbers, keys, strict=True):
            for kind, tensor in inner.moments.get(number, {}).items():
                found.setdefault(kind, {})[key] = tensor
    return found


def _masters(masters: Any, groups: list[list[Key]], parameters: Mapping[Key, Tensor], where: str) -> dict[Key, Tensor]:
    lists = isinstance(masters, list | tuple) and all(isinstance(group, list | tuple) for group in masters)
    shapes = [[getattr(tensor, "shape", None) for tensor in group] for group in masters] if lists else None
    if shapes != [[parameters[key].shape for key in keys] for keys in groups]:
        raise CheckpointError(f"{where}: the fp32 weights belong to other parameters. {_NO_OPTIMIZER}")
    return {
        key: tensor
        for group, keys in zip(masters, groups, strict=True)
        for key, tensor in zip(keys, group, strict=True)
    }
