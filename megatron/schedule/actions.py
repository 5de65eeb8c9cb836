"""A pipeline schedule as data: for each rank a list of actions, with a one-line text form. No torch.

A stage is a span of layers. Stage s lies on rank s mod p, so with several chunks a rank the stages loop over the ranks.
Text form as in torch's pipeline CSVs, `<stage><action><microbatch>`: `0F0,1SEND_F2,0RECV_B1`. E, R and D are our
extensions.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megatron.errors import EELLMError


class ScheduleError(EELLMError):
    """A schedule that cannot be made, read or run as asked; the message names the place and the mend."""

    exit_code = 2


class Op(str, Enum):
    """What an action does. A send is asynchronous; a receive is posted, and whoever needs the message waits for it."""

    FORWARD = "F"
    HEADS = "E"  # exit heads: forward, loss, backward to the detached taps
    BACKWARD = "B"  # the full backward pass
    INPUT = "I"  # its half that makes the gradient of the stage's input
    WEIGHT = "W"  # its half that makes the gradients of the weights
    REDUCE = "R"  # sum a gradient bucket over its ranks; the bucket's number stands in the microbatch's place
    DROP = "D"  # drop what a microbatch keeps on a stage: it gets no backward pass there
    SEND_F = "SEND_F"  # a stage's output to the next stage
    RECV_F = "RECV_F"  # a stage's input from the previous stage
    SEND_B = "SEND_B"  # the gradient of a stage's input to the previous stage
    RECV_B = "RECV_B"  # the gradient of a stage's output from the next stage

    __hash__ = str.__hash__  # Enum's own runs in Python, and schedules have hundreds of thousands of actions


COMPUTES = frozenset({Op.FORWARD, Op.HEADS, Op.BACKWARD, Op.INPUT, Op.WEIGHT, Op.DROP})
BACKWARDS = frozenset({Op.BACKWARD, Op.INPUT})  # what makes the gradient for the stage below
SENDS = {Op.SEND_F: (Op.RECV_F, 1), Op.SEND_B: (Op.RECV_B, -1)}  # its receive, and how many stages up that is
RECEIVES = {Op.RECV_F: (Op.SEND_F, -1), Op.RECV_B: (Op.SEND_B, 1)}
_OTHER_END = {**SENDS, **RECEIVES}

# Longest names first: a pattern takes the first that fits.
_WORD = re.compile(rf"(\d+)({'|'.join(sorted((op.value for op in Op), key=len, reverse=True))})(\d+)")


class Action(NamedTuple):
    """One step of a rank: an operation on one microbatch (R: on one bucket) at one stage."""

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> "Action":
        """Read `0F3`. Raises ScheduleError for anything else."""
        match = _WORD.fullmatch(text.strip())
        if not match:
            names = ", ".join(op.value for op in Op)
            raise ScheduleError(f"{text!r} is not an action: expected <stage><one of {names}><microbatch>, as 0F3")
        return Action(int(match[1]), Op(match[2]), int(match[3]))


def other_end(message: Action) -> Action:
    """The receive that takes a send, the send that a receive waits for."""
    op, step = _OTHER_END[message.op]
    return Action(message.stage + step, op, message.microbatch)


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order. `schedule[r]` is the list of rank r."""

    ranks: tuple[tuple[Action, ...], ...]

    @staticmethod
    def of(ranks: Iterable[Iterable[Action]]) -> "Schedule":
        """From any nested lists."""
        return Schedule(tuple(tuple(rank) for rank in ranks))

    def __getitem__(self, rank: int) -> tuple[Action, ...]:
        return self.ranks[rank]

    def __iter__(self) -> Iterator[tuple[Action, ...]]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def num_ranks(self) -> int:
        """p."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Stages that do anything."""
        return 1 + max((action.stage for rank in self.ranks for action in rank), default=-1)

    @property
    def num_microbatches(self) -> int:
        """Microbatches that are begun."""
        return 1 + max((a.microbatch for rank in self.ranks for a in rank if a.op is Op.FORWARD), default=-1)

    def rank_of(self, stage: int) -> int:
        """Where a stage lies."""
        return stage % len(self.ranks)

    def computes(self) -> "Schedule":
        """Without messages and reductions."""
        return Schedule(tuple(tuple(action for action in rank if action.op in COMPUTES) for rank in self.ranks))

    @property
    def has_messages(self) -> bool:
        """Whether sends and receives are in it."""
        return any(action.op in SENDS or action.op in RECEIVES for rank in self.ranks for action in rank)


@dataclass(frozen=True)
class Pipeline:
    """What a schedule is asked for.

    heads: the stages with any head, the last stage's final one included. chunks: stages per rank. tuning: only heads
    learn, so nothing goes backward, and nothing runs beyond the last stage with a head. Raises ScheduleError for what
    cannot be.
    """

    num_ranks: int
    num_microbatches: int
    heads: frozenset[int]
    chunks: int = 1
    tuning: bool = False

    def __post_init__(self) -> None:
        if min(self.num_ranks, self.num_microbatches, self.chunks) < 1:
            raise ScheduleError(
                f"a pipeline needs ranks, microbatches and chunks of at least 1, not {self.num_ranks}, "
                f"{self.num_microbatches} and {self.chunks}"
            )
        beyond = sorted(stage for stage in self.heads if not 0 <= stage < self.num_stages)
        if beyond:
            raise ScheduleError(f"a head on stage {beyond[0]}, but the stages are 0 to {self.num_stages - 1}")
        if self.tuning and not self.heads:
            raise ScheduleError("tuning exits needs a stage with an exit")
        if not self.tuning and self.num_stages - 1 not in self.heads:
            raise ScheduleError(f"the last stage, {self.num_stages - 1}, has the final head: name it among the heads")

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return self.num_ranks * self.chunks

    @property
    def active_stages(self) -> int:
        """Stages that run: all, or under tuning up to the last with a head."""
        return max(self.heads) + 1 if self.tuning else self.num_stages

    def stages_of(self, rank: int) -> range:
        """The stages of a rank that run, first to last."""
        return range(rank, self.active_stages, self.num_ranks)


@dataclass(frozen=True)
class Flow:
    """Which (stage, microbatch) a schedule runs forward, and which backward: from it follows what is handed over."""

    forwards: frozenset[tuple[int, int]]
    backwards: frozenset[tuple[int, int]]

    @staticmethod
    def of(schedule: Schedule) -> "Flow":
        """Read off a schedule's computes."""
        actions = [action for rank in schedule for action in rank]
        return Flow(
            frozenset((a.stage, a.microbatch) for a in actions if a.op is Op.FORWARD),
            frozenset((a.stage, a.microbatch) for a in actions if a.op in BACKWARDS),
        )

    def needs(self, action: Action) -> Action | None:
        """The compute of a neighbouring stage whose result `action` takes, as a receive; None where it takes none.

        A backward takes a gradient from above if the microbatch has a backward there.
        """
        stage, op, microbatch = action
        if op is Op.FORWARD and stage > 0:
            return Action(stage, Op.RECV_F, microbatch)
        if op in BACKWARDS and (stage + 1, microbatch) in self.backwards:
            return Action(stage, Op.RECV_B, microbatch)
        return None

    def makes(self, action: Action) -> Action | None:
        """What a neighbouring stage takes from `action`, as a send; None where nothing is."""
        stage, op, microbatch = action
        if op is Op.FORWARD and (stage + 1, microbatch) in self.forwards:
            return Action(stage, Op.SEND_F, microbatch)
        if op in BACKWARDS and (stage - 1, microbatch) in self.backwards:
            return Action(stage, Op.SEND_B, microbatch)
        return None


def to_text(schedule: Schedule) -> str:
    """One line per rank, each ended by a newline; actions separated by commas. A rank without any is an empty line."""
    return "".join(",".join(str(action) for action in rank) + "\n" for rank in schedule)


def from_text(text: str) -> Schedule:
    """Inverse of `to_text`; empty words, as torch writes them for idle time, are skipped.

    Raises ScheduleError naming line and word.
    """
    ranks = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        actions = []
        for place, word in enumerate(line.split(","), start=1):
            try:
                actions += [Action.parse(word)] if word.strip() else []
            except ScheduleError as error:
                raise ScheduleError(f"line {number}, word {place}: {error}") from None
        ranks.append(actions)
    return Schedule.of(ranks)
