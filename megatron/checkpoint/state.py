"""What a checkpoint holds, whatever its format: named tensors and a JSON part; nothing else exists in one.

Keys are `model/<parameter>` and `optimizer/<exp_avg|exp_avg_sq|momentum_buffer|master>/<parameter>`; rows that only
pad the vocabulary are apart, as `<key>.padding`. Comparing and copying is checked as a whole before a value changes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.errors import CheckpointError
from megatron.logs import get_logger
from megatron.parallel.placement import Placed

PADDING = ".padding"
MODEL = "model/"
OPTIMIZER = "optimizer/"

_SHOWN = 8
_log = get_logger(__name__)

Entry = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor."""


@dataclass
class RunState:
    """Tensors, or a rank's parts of them, by key; and facts: a dict that JSON can hold (iteration, config, …)."""

    tensors: dict[str, Tensor | Placed] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Shape and dtype of every tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def without(names: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The items whose key starts with none of `prefixes`: what a load knowingly leaves aside."""
    return {name: value for name, value in names.items() if not name.startswith(prefixes)}


def copy_into(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    what: str,
    *,
    ignore: tuple[str, ...] = (),
    convert: bool = False,
) -> None:
    """Copy every tensor of `source` into the (view of a) live tensor of the same name in `target`.

    `what` names the source in messages. `ignore` lists key prefixes of the source that are left aside. With
    `convert`, model weights of another floating type are converted; nothing else ever is.

    Raises:
        CheckpointError: a name is missing or extra, or a shape or type differs; nothing has been copied then.
    """
    source = without(source, ignore)
    check(entries(source), entries(target), what, convert=convert)
    with torch.no_grad():
        for name, tensor in target.items():
            if name.endswith(PADDING):
                copy_padding(source.get(name), tensor)
            else:
                tensor.copy_(source[name])


def copy_padding(source: Tensor | None, target: Tensor) -> None:
    """Copy the padding rows that both have and zero the others: their number depends on the parallel layout."""
    rows = 0 if source is None else min(source.shape[0], target.shape[0])
    with torch.no_grad():
        if source is not None:
            target[:rows].copy_(source[:rows])
        target[rows:].zero_()


def check(found: Mapping[str, Entry], wanted: Mapping[str, Entry], what: str, *, convert: bool = False) -> None:
    """Compare what a checkpoint holds with what the run has; padding rows may differ in number.

    Raises:
        CheckpointError: one message with the first names of each kind of difference, and the likely mend.
    """
    missing = [name for name in wanted if name not in found and not name.endswith(PADDING)]
    extra = [name for name in found if name not in wanted and not name.endswith(PADDING)]
    both = [name for name in wanted if name in found]
    shapes = [name for name in both if _shape(name, found) != _shape(name, wanted)]
    types = [name for name in both if not _type_fits(name, found[name][1], wanted[name][1], convert)]
    if not (missing or extra or shapes or types):
        _say_padding(found, wanted, what)
        return

    def sizes(name: str) -> str:
        return f"{name}: checkpoint {list(found[name][0])}, model {list(wanted[name][0])}"

    def dtypes(name: str) -> str:
        return f"{name}: checkpoint {_plain(found[name][1])}, model {_plain(wanted[name][1])}"

    lines = [f"{what} does not fit the model; nothing was loaded."]
    lines += _listed("missing from the checkpoint", missing, lambda name: f"{name} {list(wanted[name][0])}")
    lines += _listed("not in the model", extra, lambda name: f"{name} {list(found[name][0])}")
    lines += _listed("of another shape", shapes, sizes)
    lines += _listed("of another type", types, dtypes)
    lines += [f"  hint: {hint}" for hint in _hints(found, wanted, missing, extra, shapes + types)]
    raise CheckpointError("\n".join(lines))


def _shape(name: str, index: Mapping[str, Entry]) -> tuple[int, ...]:
    shape = index[name][0]
    return shape[1:] if name.endswith(PADDING) else shape


def _type_fits(name: str, found: torch.dtype, wanted: torch.dtype, convert: bool) -> bool:
    if found == wanted:
        return True
    return convert and name.startswith(MODEL) and found.is_floating_point and wanted.is_floating_point


def _say_padding(found: Mapping[str, Entry], wanted: Mapping[str, Entry], what: str) -> None:
    padded = [name for name in {*found, *wanted} if name.endswith(PADDING)]
    if any(found.get(name, ((0,),))[0][0] != wanted.get(name, ((0,),))[0][0] for name in padded):
        _log.info("%s pads the vocabulary to another size: rows without a counterpart start at zero.", what)


def _listed(title: str, names: list[str], show: Callable[[str], str]) -> list[str]:
    if not names:
        return []
    rest = [f"    … and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"  {title}:"] + [f"    {show(name)}" for name in names[:_SHOWN]] + rest


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.search(pattern, name))})


def _hints(
    found: Mapping[str, Entry],
    wanted: Mapping[str, Entry],
    missing: list[str],
    extra: list[str],
    unfit: list[str],
) -> list[str]:
    """The likely mends, each for one kind of difference."""
    hints = []
    differing = missing + extra + unfit
    theirs, ours = (_numbers(rf"^{MODEL}exits\.(\d+)\.", names) for names in (found, wanted))
    if theirs != ours:
        mend = f"give --exit-layer-nums {_spaced(theirs)}, or leave it out and give --use-checkpoint-args"
        mend = mend if theirs else "add exits with the checkpoint converter"
        hints.append(f"the checkpoint has exits {_spaced(theirs)}, the model {_spaced(ours)}: {mend}")
    theirs, ours = (_numbers(rf"^{MODEL}layers\.(\d+)\.", names) for names in (found, wanted))
    if len(theirs) != len(ours):
        hints.append(f"the checkpoint has {len(theirs)} layers, the model {len(ours)}: give --num-layers {len(theirs)}")
    if f"{MODEL}output.weight" in missing + extra:
        hints.append("one of them ties input and output embeddings: see --untie-embeddings-and-output-weights")
    if f"{MODEL}embedding.word.weight" in unfit:
        hints.append("if the numbers of rows differ, the tokenizers do: give the checkpoint's")
    if any(name.startswith(OPTIMIZER) for name in differing):
        hints.append("--no-load-optim or --finetune takes the weights alone")
    if any(name.startswith(MODEL) for name in differing):
        hints.append("leave the model's flags out and give --use-checkpoint-args: the checkpoint has its shape")
    return hints


def _spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers)) or "none"
