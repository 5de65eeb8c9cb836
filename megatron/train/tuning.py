"""What tuning exits on a frozen backbone (EE-Tuning, arXiv 2402.00518) changes about loading and saving.

Only the first stages may be loaded, other exits of the checkpoint stay behind, tied heads get copies of their own, and
what is saved may be the exits alone.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from megatron.checkpoint.part import EXITS, HOLDS
from megatron.checkpoint.state import MODEL, OPTIMIZER, PADDING
from megatron.config.run import RunConfig
from megatron.logs import get_logger
from megatron.train.trainer import Trainer

log = get_logger(__name__)

_WORD = f"{MODEL}embedding.word.weight"
_PLACE = re.compile(rf"(?:{MODEL}|{OPTIMIZER}[a-z_]+/)(?:(layers|exits)\.(\d+)\.|(final_norm|output)\.)")


def untie_heads(config: RunConfig) -> RunConfig:
    """Exits that are tuned own their output matrices: a frozen one can't learn, and would change the backbone."""
    if not config.parallel.tune_exit or config.exits.untie_exit_output_weights:
        return config
    log.info("--tune-exit: each exit gets its own copy of the output matrix that it was tied to")
    return replace(config, exits=replace(config.exits, untie_exit_output_weights=True))


def is_of_exits(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to an exit, parameter or optimizer state."""
    found = _PLACE.match(name)
    return found is not None and found[1] == "exits"


def left_behind(trainer: Trainer, names: Collection[str]) -> frozenset[str]:
    """The tensors of a checkpoint that a tuning run has no place for: later stages, and exits that it doesn't tune."""
    if not trainer.tuning:
        return frozenset()
    last = trainer.partition[-1]
    exits = {spec.label for stage in trainer.partition for spec in stage.exits}

    def has_place(name: str) -> bool:
        found = _PLACE.match(name)
        if found is None:
            return True
        if found[1] == "layers":
            return int(found[2]) < last.last
        return found[2] in exits if found[1] else last.is_last

    return frozenset(name for name in names if not has_place(name))


def copies_of_tied_heads(trainer: Trainer, stored: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Output matrices that the checkpoint's exits don't own, and the one that each is a copy of."""
    if not trainer.tuning:
        return {}
    suffixes = {".output.weight": _WORD, f".output.weight{PADDING}": f"{_WORD}{PADDING}"}
    return {
        name: source
        for name in wanted
        for suffix, source in suffixes.items()
        if name.startswith(f"{MODEL}exits.") and name.endswith(suffix) and name not in stored and source in stored
    }


def holds(trainer: Trainer) -> dict[str, Any]:
    """The fact "holds" of a checkpoint that isn't a whole model: "exits", or the number of its first layers."""
    if not trainer.tuning:
        return {}
    if trainer.config.checkpoint.save_exits_only:
        return {HOLDS: EXITS}
    last = trainer.partition[-1]
    return {} if last.is_last else {HOLDS: last.last}
