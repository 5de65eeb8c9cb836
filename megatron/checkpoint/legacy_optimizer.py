"""Which parameter each entry of a legacy optimizer's state belongs to: entries are numbered, not named.

Numbers follow the order in which the original's modules registered their parameters, weights that decay first;
every assignment is verified against the parameters' shapes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron.checkpoint.legacy_names import TIED_COPY
from megatron.errors import CheckpointError

_KINDS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_NO_OPTIMIZER = "Give --no-load-optim or --finetune to take the weights alone"

Key = tuple[int, str]
"""(chunk of an interleaved pipeline, legacy name)."""


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
    inner = _torch_state(state)
    if "state" not in inner or not all("params" in group for group in inner["param_groups"]):
        raise CheckpointError(f"{where}: the optimizer's state is sharded and is not read. {_NO_OPTIMIZER}")
    trained = [key for key in parameters if not tune_exit or "exit" in key[1] or ".branch." in key[1]]
    masters = state.get("fp32_from_fp16_params")
    orders = [_early_exit_order(trained), _plain_order(trained)]
    for order in orders if early_exit else reversed(orders):
        groups = _decay_groups(order, parameters)
        if _fits(inner, groups, parameters):
            found = _moments(inner, groups)
            return found if masters is None else found | {"master": _masters(masters, groups, parameters, where)}
    raise CheckpointError(f"{where}: the optimizer's state belongs to other parameters. {_NO_OPTIMIZER}")


def optimizer_step(state: Mapping[str, Any]) -> int | None:
    """The number of updates an optimizer has made, from its groups or its first entry; None if it doesn't say."""
    inner = _torch_state(state)
    for holder in [*inner.get("param_groups", ()), *inner.get("state", {}).values()]:
        if "step" in holder:
            return int(holder["step"])
    return None


def _torch_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inner optimizer's own state: mixed precision wraps it."""
    return state.get("optimizer", state)


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


def _fits(inner: Mapping[str, Any], groups: list[list[Key]], parameters: Mapping[Key, Tensor]) -> bool:
    recorded = [group["params"] for group in inner["param_groups"]]
    if [len(group) for group in recorded] != [len(group) for group in groups]:
        return False
    return all(
        tensor.shape == parameters[key].shape
        for numbers, keys in zip(recorded, groups, strict=True)
        for number, key in zip(numbers, keys, strict=True)
        for kind, tensor in inner["state"].get(number, {}).items()
        if kind in _KINDS and tensor is not None
    )


def _moments(inner: Mapping[str, Any], groups: list[list[Key]]) -> dict[str, dict[Key, Tensor]]:
    found: dict[str, dict[Key, Tensor]] = {}
    for group, keys in zip(inner["param_groups"], groups, strict=True):
        for number, key in zip(group["params"], keys, strict=True):
            for kind, tensor in inner["state"].get(number, {}).items():
                if kind in _KINDS and tensor is not None:
                    found.setdefault(kind, {})[key] = tensor
    return found


def _masters(
    masters: list[list[Tensor]], groups: list[list[Key]], parameters: Mapping[Key, Tensor], where: str
) -> dict[Key, Tensor]:
    shapes = [[tensor.shape for tensor in group] for group in masters]
    if shapes != [[parameters[key].shape for key in keys] for keys in groups]:
        raise CheckpointError(f"{where}: the fp32 weights belong to other parameters. {_NO_OPTIMIZER}")
    return {
        key: tensor
        for group, keys in zip(masters, groups, strict=True)
        for key, tensor in zip(keys, group, strict=True)
    }
