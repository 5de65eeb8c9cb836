"""Runs one rank's action list on its stages. The only module of this room that handles tensors.

It knows no model and no process group: stages and the link are handed in. A receive is posted where the schedule says
so and waited for by the action that needs it; what a microbatch keeps is dropped with its last action.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron.schedule.actions import BACKWARDS, Action, Flow, Op, Schedule, other_end
from megatron.schedule.check import adds_gradients
from megatron.schedule.terms import Normalization, Terms, derive_terms
from megatron.schedule.trace import Recorder

Key = tuple[int, int]  # stage, microbatch
_TAKES_ACTIVATIONS = BACKWARDS | {Op.HEADS, Op.DROP}


class StageLike(Protocol):
    """What the executor asks of a stage; `model.stage.Stage` is one."""

    def forward(self, batch: Any, stream: Any, received: Any = None) -> Any:
        """F: activations of a microbatch; their `take_hidden` gives what the next stage receives."""

    def backward_heads(self, activations: Any, batch: Any, objective: Any, share: Any) -> tuple[Any, Any]:
        """E: loss terms, and gradients for B."""

    def backward(self, activations: Any, gradients: Any, received: Any = None) -> Any:
        """B: the gradient for the stage before, None on the first."""

    def backward_input(self, activations: Any, gradients: Any, received: Any = None) -> tuple[Any, list]:
        """I: as B, and the functions that W is to call."""

    def empty_message(self, batch: Any) -> Any:
        """A tensor of the shape that crosses the stage's borders, hidden state or gradient."""


class LinkLike(Protocol):
    """Messages to other ranks; `parallel.p2p.PipelineLink` is one."""

    def send(self, tensor: Any, rank: int, direction: int) -> None:
        """Begin to send."""

    def receive(self, into: Any, rank: int, direction: int) -> Any:
        """Begin to receive; the result has `wait`."""

    def finish(self) -> None:
        """Wait until all has been sent."""


@dataclass
class Step:
    """What the actions of a step work on.

    batches, streams: data and dropout streams by microbatch. share: stage and microbatch to how its losses weigh.
    reduce: begins to sum a stage's gradient bucket over its ranks. watch: told of a stage before its last B, during
    which buckets become whole one by one. recorder: takes the times of all actions.
    """

    stages: Mapping[int, StageLike]
    batches: Sequence[Any]
    streams: Sequence[Any]
    objective: Any
    share: Callable[[int, int], Any]
    reduce: Callable[[int, int], None] | None = None
    watch: Callable[[int], None] | None = None
    recorder: Recorder | None = None


@dataclass(frozen=True)
class Plan:
    """A schedule, and what follows from it for every step that is run by it. kept: whose activations F leaves for a
    later action; under tuning a stage without heads needs none."""

    schedule: Schedule
    flow: Flow
    terms: Terms
    kept: frozenset[Key]
    last_backwards: frozenset[Action]

    @staticmethod
    def of(schedule: Schedule, normalization: Normalization = "unbiased") -> "Plan":
        """The plan of a valid schedule."""
        last = {a.stage: a for rank in schedule for a in rank if adds_gradients(a, heads_only=False)}
        whole = frozenset(action for action in last.values() if action.op is Op.BACKWARD)
        kept = frozenset((a.stage, a.microbatch) for rank in schedule for a in rank if a.op in _TAKES_ACTIVATIONS)
        return Plan(schedule, Flow.of(schedule), derive_terms(schedule, normalization), kept, whole)


def run(plan: Plan, rank: int, step: Step, link: LinkLike | None = None) -> dict[Key, Any]:
    """Execute a rank's actions in order; returns the loss terms of E by (stage, microbatch)."""
    worker = _Worker(plan, rank, step, link)
    for action in plan.schedule[rank]:
        worker.do(action)
    if link is not None:
        link.finish()
    return worker.losses


@dataclass
class _Worker:
    plan: Plan
    rank: int
    step: Step
    link: LinkLike | None
    losses: dict[Key, Any] = field(default_factory=dict)
    _activations: dict[Key, Any] = field(default_factory=dict)
    _gradients: dict[Key, Any] = field(default_factory=dict)
    _weight_work: dict[Key, list[Callable[[], None]]] = field(default_factory=dict)
    _made: dict[Action, Any] = field(default_factory=dict)  # by the send that takes it away
    _coming: dict[Action, tuple[Any, Any]] = field(default_factory=dict)  # by the receive: tensor, what to wait for

    def __post_init__(self) -> None:
        self._by_op = {
            Op.FORWARD: self._forward,
            Op.HEADS: self._heads,
            Op.BACKWARD: self._backward,
            Op.INPUT: self._backward,
            Op.WEIGHT: self._weights,
            Op.DROP: self._drop,
            Op.REDUCE: lambda action: self.step.reduce(action.stage, action.microbatch),
            Op.SEND_F: self._send,
            Op.SEND_B: self._send,
            Op.RECV_F: self._receive,
            Op.RECV_B: self._receive,
        }

    def do(self, action: Action) -> None:
        """One action."""
        recorder = self.step.recorder
        if recorder is None:
            self._by_op[action.op](action)
            return
        recorder.turn(action)
        self._by_op[action.op](action)
        recorder.end()

    def _forward(self, action: Action) -> None:
        stage, _, m = action
        received = self._take(action)
        activations = self.step.stages[stage].forward(self.step.batches[m], self.step.streams[m], received)
        if (stage, m) in self.plan.kept:
            self._activations[stage, m] = activations
        self._hand_over(action, activations.take_hidden())

    def _heads(self, action: Action) -> None:
        stage, _, m = action
        key, share = (stage, m), self.step.share(stage, m)
        self.losses[key], self._gradients[key] = self.step.stages[stage].backward_heads(
            self._activations[key], self.step.batches[m], self.step.objective, share
        )
        if key not in self.plan.flow.backwards:
            self._drop(action)

    def _backward(self, action: Action) -> None:
        stage, _, m = action
        received = self._take(action)
        if received is not None and (factor := self.plan.terms.gradient_factor(stage, m)) != 1.0:
            received = received * factor
        if self.step.watch is not None and action in self.plan.last_backwards:
            self.step.watch(stage)
        activations, gradients = self._activations.pop((stage, m)), self._gradients.pop((stage, m), [])
        if action.op is Op.INPUT:
            made, waiting = self.step.stages[stage].backward_input(activations, gradients, received)
            self._weight_work[stage, m] = waiting
        else:
            made = self.step.stages[stage].backward(activations, gradients, received)
        self._hand_over(action, made)

    def _weights(self, action: Action) -> None:
        waiting = self._weight_work.pop((action.stage, action.microbatch))
        while waiting:  # each keeps an input and a gradient alive
            waiting.pop()()

    def _drop(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        self._activations.pop(key)
        self._gradients.pop(key, None)

    def _take(self, action: Action) -> Any:
        """What a neighbouring stage made for `action`; None where it needs nothing."""
        receive = self.plan.flow.needs(action)
        if receive is None:
            return None
        tensor, work = self._coming.pop(receive)
        if work is not None:
            work.wait()
        if self.step.recorder is not None:
            self.step.recorder.start()
        return tensor

    def _hand_over(self, action: Action, tensor: Any) -> None:
        send = self.plan.flow.makes(action)
        if send is None:
            return
        receive = other_end(send)
        if self.plan.schedule.rank_of(receive.stage) == self.rank:
            self._coming[receive] = tensor, None
        else:
            self._made[send] = tensor

    def _send(self, action: Action) -> None:
        receive = other_end(action)
        self.link.send(self._made.pop(action), self.plan.schedule.rank_of(receive.stage), _direction(receive))

    def _receive(self, action: Action) -> None:
        into = self.step.stages[action.stage].empty_message(self.step.batches[action.microbatch])
        source = self.plan.schedule.rank_of(other_end(action).stage)
        self._coming[action] = into, self.link.receive(into, source, _direction(action))


def _direction(receive: Action) -> int:
    return int(receive.op is Op.RECV_B)
