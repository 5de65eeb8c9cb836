"""A pipeline schedule as data: for each rank a list of actions, with a one-line text form. No torch.

`F` forward, `E` exit heads (forward, loss and backward to the detached taps), `B` backward. Text form as torch's
pipeline CSVs, `<stage><action><microbatch>`: `0F0,0E0,0B0`; `E` is our extension.
"""

import re
from dataclasses import dataclass
from enum import Enum

from megatron.errors import EELLMError


class Op(str, Enum):
    """What an action does."""

    FORWARD = "F"
    HEADS = "E"
    BACKWARD = "B"


@dataclass(frozen=True)
class Action:
    """One step of a rank: an operation on one microbatch at one stage."""

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> "Action":
        """Read `0F3`. Raises ScheduleError for anything else."""
        match = re.fullmatch(r"(\d+)([FEB])(\d+)", text.strip())
        if not match:
            raise ScheduleError(f"{text!r} is not an action: expected <stage><F, E or B><microbatch>, as 0F3")
        return Action(int(match[1]), Op(match[2]), int(match[3]))


class ScheduleError(EELLMError):
    """A schedule that is incomplete or out of order; the message names the action."""


Schedule = tuple[tuple[Action, ...], ...]  # per rank


def to_text(schedule: Schedule) -> str:
    """One line per rank, actions separated by commas."""
    return "\n".join(",".join(str(action) for action in rank) for rank in schedule)


def from_text(text: str) -> Schedule:
    """Inverse of `to_text`."""
    return tuple(tuple(Action.parse(word) for word in line.split(",") if word) for line in text.splitlines() if line)
