"""Checkpoints that hold a part of a model: what a run that tunes exits saved (the fact "holds")."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError

HOLDS = "holds"
EXITS = "exits"  # its value where there are the exits alone; else the number of the model's first layers


def check_whole(facts: Mapping[str, Any], directory: Path) -> None:
    """Raise CheckpointError where a checkpoint's facts say that it holds a part, with the mend."""
    held = facts.get(HOLDS)
    if held is not None:
        what = "exits alone" if held == EXITS else f"the first {held} layers alone"
        raise CheckpointError(
            f"{directory} holds {what}: merge it into the model that it was tuned on with "
            "tools/checkpoint/checkpoint_converter.py --load-dir MODEL --merge-exits"
        )
