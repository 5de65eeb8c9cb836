"""How long a schedule takes with given costs, where ranks idle, and what memory they need. No torch.

Sends are asynchronous: a message leaves when it is sent and its receive is posted, and messages from one rank to
another go one after the other. Without messages in the schedule, each leaves when it is made. Reductions, sends and
receives take no time of a rank.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.schedule.actions import (
    BACKWARDS,
    COMPUTES,
    RECEIVES,
    SENDS,
    Action,
    Flow,
    Op,
    Schedule,
    ScheduleError,
    other_end,
)


@dataclass(frozen=True)
class Costs:
    """What one microbatch costs on one stage. Times in seconds or any one unit, memory in bytes or any one unit.

    forward, heads, input, weight: times of F, E and the two halves of B. message: of a message to the next stage, and
    of one back from it. kept: activations from F until the last action of the microbatch. heads_peak, backward_peak:
    what E and B (or I) need beside them while they run. heads_kept: the gradients that E leaves for B.
    """

    forward: float = 1.0
    heads: float = 0.0
    input: float = 1.0
    weight: float = 1.0
    message: float = 0.0
    kept: float = 1.0
    heads_peak: float = 0.0
    heads_kept: float = 0.0
    backward_peak: float = 0.0

    def time(self, op: Op) -> float:
        """How long an action occupies its rank."""
        times = {
            Op.FORWARD: self.forward,
            Op.HEADS: self.heads,
            Op.BACKWARD: self.input + self.weight,
            Op.INPUT: self.input,
            Op.WEIGHT: self.weight,
        }
        return times.get(op, 0.0)


class Span(NamedTuple):
    """An action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each action ran, simulated or measured, by rank in order. peak_memory: of activations, by rank."""

    spans: tuple[tuple[Span, ...], ...]
    peak_memory: tuple[float, ...] = ()

    @property
    def makespan(self) -> float:
        """The end of the last action; the step starts at 0."""
        return max((span.end for rank in self.spans for span in rank), default=0.0)

    def scaled(self, factor: float) -> "Timeline":
        """The same in another unit of time."""
        spans = tuple(tuple(Span(a, start * factor, end * factor) for a, start, end in rank) for rank in self.spans)
        return Timeline(spans, self.peak_memory)

    def busy(self, rank: int) -> float:
        """How long a rank computes."""
        return sum(span.end - span.start for span in self.spans[rank] if span.action.op in COMPUTES)

    def bubble(self, rank: int) -> float:
        """The share of the step that a rank idles."""
        return 1 - self.busy(rank) / self.makespan if self.makespan else 0.0

    @property
    def bubble_share(self) -> float:
        """The share of all ranks' time that is idle; (p - 1)/(m + p - 1) for 1F1B on equal stages."""
        return sum(self.bubble(rank) for rank in range(len(self.spans))) / len(self.spans)


def simulate(schedule: Schedule, costs: Sequence[Costs]) -> Timeline:
    """Run `schedule` on paper; costs[s] are those of stage s.

    Raises ScheduleError where costs are missing for a stage, or where ranks wait for each other forever.
    """
    if schedule.num_stages > len(costs):
        raise ScheduleError(f"costs of {len(costs)} stages for a schedule of {schedule.num_stages}")
    clock = _Clock(schedule, costs)
    clock.run()
    return Timeline(tuple(tuple(spans) for spans in clock.spans), peak_memory(schedule, costs))


class _Clock:
    """The state of a simulation: the time of each rank and of each message."""

    def __init__(self, schedule: Schedule, costs: Sequence[Costs]) -> None:
        self.spans: list[list[Span]] = [[] for _ in schedule]
        self._schedule = schedule
        self._flow = Flow.of(schedule)
        self._times = [{op: stage.time(op) for op in Op} for stage in costs]
        self._costs = costs
        self._now = [0.0] * len(schedule)
        self._messages = schedule.has_messages
        self._sent: dict[Action, float] = {}  # by receive
        self._posted: dict[Action, float] = {}
        self._arrived: dict[Action, float] = {}
        self._line_free: dict[tuple[int, int], float] = {}

    def run(self) -> None:
        ready = deque(range(len(self._schedule)))
        while ready:
            ready.extend(self._run_rank(ready.popleft()))
        for rank, actions in enumerate(self._schedule):
            if len(self.spans[rank]) < len(actions):
                raise ScheduleError(
                    f"rank {rank} waits forever at {actions[len(self.spans[rank])]}: validate tells why"
                )

    def _run_rank(self, rank: int) -> list[int]:
        """As far as it goes; returns the ranks that may now go on."""
        woken = []
        actions, spans, p = self._schedule[rank], self.spans[rank], len(self._schedule)
        for place in range(len(spans), len(actions)):
            action = actions[place]
            stage, op, _ = action
            start = self._start(action, rank)
            if start is None:
                break
            end = self._now[rank] = start + self._times[stage][op]
            spans.append(Span(action, start, end))
            message = self._message(action, end)
            if message:
                self._launch(message)
                woken.append(message.stage % p)
        return woken

    def _start(self, action: Action, rank: int) -> float | None:
        """When an action can begin; None where its message is not known yet."""
        needs = self._flow.needs(action)
        if needs is None or other_end(needs).stage % len(self._schedule) == rank:
            return self._now[rank]
        arrived = self._arrived.get(needs)
        return None if arrived is None else max(arrived, self._now[rank])

    def _message(self, action: Action, now: float) -> Action | None:
        """Note a send or a receive; returns the receive of the message concerned."""
        if action.op in RECEIVES:
            self._posted[action] = now
            return action
        if action.op in SENDS:
            self._sent[other_end(action)] = now
            return other_end(action)
        made = None if self._messages else self._flow.makes(action)
        if made is None:
            return None
        receive = other_end(made)
        self._sent[receive], self._posted[receive] = now, 0.0
        return receive

    def _launch(self, receive: Action) -> None:
        """Let the message travel if both ends are there."""
        if receive not in self._sent or receive not in self._posted:
            return
        p, source = len(self._schedule), other_end(receive).stage
        line = (source % p, receive.stage % p)
        leaves = max(self._sent[receive], self._posted[receive], self._line_free.get(line, 0.0))
        arrives = leaves + self._costs[min(source, receive.stage)].message
        self._line_free[line] = self._arrived[receive] = arrives


def peak_memory(schedule: Schedule, costs: Sequence[Costs]) -> tuple[float, ...]:
    """Most memory that each rank needs for activations at a time."""
    last = {(a.stage, a.microbatch): a.op for rank in schedule for a in rank if a.op in COMPUTES}
    return tuple(_rank_memory(rank, costs, last) for rank in schedule)


def _rank_memory(actions: Sequence[Action], costs: Sequence[Costs], last: dict[tuple[int, int], Op]) -> float:
    held = peak = 0.0
    gradients: dict[tuple[int, int], float] = {}  # what heads have left for a backward to come
    for stage, op, microbatch in actions:
        if op not in COMPUTES:
            continue
        cost, key = costs[stage], (stage, microbatch)
        if op is Op.FORWARD:
            held += cost.kept
        needed = cost.heads_peak if op is Op.HEADS else cost.backward_peak if op in BACKWARDS else 0.0
        peak = max(peak, held + needed)
        if op is Op.HEADS and last[key] is not op:
            gradients[key] = cost.heads_kept
            held += cost.heads_kept
            peak = max(peak, held)
        elif op in BACKWARDS:
            held -= gradients.pop(key, 0.0)
        if last[key] is op:
            held -= cost.kept
    return peak
