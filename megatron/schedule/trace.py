"""What a rank really did, and when: recorded action by action; read as a timeline, as costs, and for a trace viewer.

No torch. A stamp is whatever the device's clock gives (`parallel.backend.Backend.stamp`); times are in seconds from the
beginning of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from megatron.schedule.actions import COMPUTES, Action, Op
from megatron.schedule.simulate import Costs, Span, Timeline

_MICROSECONDS = 1e6  # a second in the unit of trace files


class Happened(NamedTuple):
    """One action: when its turn came, when what it waited for was there, when it was done."""

    action: Action
    turn: float
    start: float
    end: float


@dataclass
class Recorder:
    """Takes a rank's stamps while a step runs. seconds: the time from one stamp to another."""

    stamp: Callable[[], Any]
    seconds: Callable[[Any, Any], float]
    _origin: Any = None
    _stamps: list[list[Any]] = field(default_factory=list)
    _actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._origin = self.stamp()

    def turn(self, action: Action) -> None:
        """An action is next."""
        self._actions.append(action)
        self._stamps.append([self.stamp()] * 2)

    def start(self) -> None:
        """What the action waited for is there."""
        self._stamps[-1][1] = self.stamp()

    def end(self) -> None:
        """The action is done."""
        self._stamps[-1].append(self.stamp())

    def happened(self) -> list[Happened]:
        """All actions, in order."""
        times = [[self.seconds(self._origin, stamp) for stamp in stamps] for stamps in self._stamps]
        return [Happened(action, *three) for action, three in zip(self._actions, times, strict=True)]


def timeline(ranks: Sequence[Sequence[Happened]]) -> Timeline:
    """Computes and reductions as they were; messages, which run beside them, are left out."""
    shown = {*COMPUTES, Op.REDUCE}
    return Timeline(tuple(tuple(Span(a, start, end) for a, _, start, end in rank if a.op in shown) for rank in ranks))


def measured_costs(ranks: Sequence[Sequence[Happened]]) -> list[Costs]:
    """The median time of each kind of action on each stage; messages are taken to be free."""
    times: dict[tuple[int, Op], list[float]] = {}
    for rank in ranks:
        for action, _, start, end in rank:
            times.setdefault((action.stage, action.op), []).append(end - start)
    middle = {key: median(values) for key, values in times.items()}
    stages = 1 + max((stage for stage, _ in middle), default=-1)

    def cost(stage: int) -> Costs:
        whole = middle.get((stage, Op.BACKWARD))
        return Costs(
            forward=middle.get((stage, Op.FORWARD), 0.0),
            heads=middle.get((stage, Op.HEADS), 0.0),
            input=middle.get((stage, Op.INPUT), 0.0) if whole is None else whole,
            weight=middle.get((stage, Op.WEIGHT), 0.0) if whole is None else 0.0,
        )

    return [cost(stage) for stage in range(stages)]


def trace_events(ranks: Sequence[tuple[str, Sequence[Happened]]]) -> dict[str, Any]:
    """The ranks, each with its name, in the Trace Event Format, which chrome://tracing and Perfetto show."""
    events: list[dict[str, Any]] = []
    for number, (name, happened) in enumerate(ranks):
        events.append({"name": "process_name", "ph": "M", "pid": number, "tid": 0, "args": {"name": name}})
        for action, turn, start, end in happened:
            where = {"pid": number, "tid": 0, "args": {"stage": action.stage, "microbatch": action.microbatch}}
            if start > turn:
                events.append(_event(f"wait for {action}", "wait", turn, start) | where)
            events.append(_event(str(action), action.op.value, start, end) | where)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(name: str, category: str, start: float, end: float) -> dict[str, Any]:
    times = {"ts": round(start * _MICROSECONDS, 3), "dur": round((end - start) * _MICROSECONDS, 3)}
    return {"name": name, "cat": category, "ph": "X", **times}
