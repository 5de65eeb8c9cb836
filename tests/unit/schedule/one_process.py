"""Runs all ranks of a schedule in one process: threads of which one runs at a time, and messages in memory.

Who goes on where several could is drawn from a seed, so a run can be repeated. Messages from one rank to another form
one queue; a receive holds NaN until it is waited for; a send may wait until its receive is posted.
"""

import random
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.exits.loss import Objective, Share
from megatron.model.gpt import GPT
from megatron.model.stage import Stage
from megatron.nn.linear import WeightGradients
from megatron.schedule.execute import Plan, Step, run


class StuckError(AssertionError):
    """All ranks wait for each other."""


class Turns:
    """Lets one of several threads run at a time; a thread gives its turn away where it waits."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._back = threading.Semaphore(0)
        self._go: dict[int, threading.Semaphore] = {}
        self._until: dict[int, Callable[[], bool]] = {}
        self._stuck = False
        self._mine = threading.local()

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Their answers. Raises what one of them raises, and StuckError where none can go on."""
        answers: dict[int, tuple[bool, Any]] = {}
        self._go = {i: threading.Semaphore(0) for i in range(len(functions))}
        self._until = {i: lambda: True for i in range(len(functions))}
        for i, function in enumerate(functions):
            threading.Thread(target=self._work, args=(i, function, answers), daemon=True).start()
        while len(answers) < len(functions) and all(ended for ended, _ in answers.values()):
            ready = [i for i, condition in self._until.items() if i not in answers and condition()]
            self._stuck = not ready
            i = self._rng.choice(ready or [i for i in self._go if i not in answers])
            self._go[i].release()
            self._back.acquire()
        for ended, answer in answers.values():
            if not ended:
                raise answer
        return [answers[i][1] for i in range(len(functions))]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let others run until `condition` holds."""
        i = self._mine.number
        self._until[i] = condition
        self._back.release()
        self._go[i].acquire()
        if self._stuck:
            raise StuckError("all ranks wait for each other")

    def _work(self, number: int, function: Callable[[], Any], answers: dict[int, tuple[bool, Any]]) -> None:
        self._mine.number = number
        self._go[number].acquire()
        try:
            answers[number] = (True, function())
        except Exception as error:  # noqa: BLE001 - raised again by `run`
            answers[number] = (False, error)
        self._back.release()


@dataclass
class Queues:
    """What the links of all ranks share: by (from, to) what was sent, and how many receives were posted."""

    turns: Turns
    blocking: bool = False
    sent: dict[tuple[int, int], list[tuple[Tensor, int]]] = field(default_factory=lambda: defaultdict(list))
    posted: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class MemoryLink:
    """A rank's end of the queues, as the executor asks for it."""

    queues: Queues
    rank: int

    def send(self, tensor: Tensor, rank: int, direction: int) -> None:
        queues, line = self.queues, (self.rank, rank)
        queues.sent[line].append((tensor.clone(), direction))
        number = len(queues.sent[line])
        if queues.blocking:
            queues.turns.wait(lambda: queues.posted[line] >= number)

    def receive(self, into: Tensor, rank: int, direction: int) -> "Waiting":
        line = (rank, self.rank)
        self.queues.posted[line] += 1
        return Waiting(self.queues, line, self.queues.posted[line], into.fill_(torch.nan), direction)

    def finish(self) -> None:
        mine = [line for line in self.queues.sent if line[0] == self.rank]
        self.queues.turns.wait(lambda: all(self.queues.posted[line] >= len(self.queues.sent[line]) for line in mine))


@dataclass
class Waiting:
    """A receive on its way: message `number` of a queue."""

    queues: Queues
    line: tuple[int, int]
    number: int
    into: Tensor
    direction: int

    def wait(self) -> None:
        sent = self.queues.sent[self.line]
        self.queues.turns.wait(lambda: len(sent) >= self.number)
        tensor, direction = sent[self.number - 1]
        assert direction == self.direction
        self.into.copy_(tensor)


class Watched(Stage):
    """A stage that notes how many microbatches' activations exist at a time on its rank."""

    def __init__(self, model: GPT, vocab_size: int, index: int, later: WeightGradients, alive: "Alive") -> None:
        super().__init__(model, vocab_size, model.stages[index], later)
        self._alive = alive

    def forward(self, batch, stream, received=None):
        activations = super().forward(batch, stream, received)
        self._alive.note(activations)
        return activations


@dataclass
class Alive:
    """Activations that exist, and the most that ever did."""

    most: int = 0
    seen: list[weakref.ref] = field(default_factory=list)

    def note(self, activations: Any) -> None:
        self.seen = [*(ref for ref in self.seen if ref() is not None), weakref.ref(activations)]
        self.most = max(self.most, len(self.seen))

    @property
    def left(self) -> int:
        return sum(ref() is not None for ref in self.seen)


@dataclass(frozen=True)
class Outcome:
    """Gradients by name, loss terms by (stage, microbatch), and by rank the activations held."""

    gradients: dict[str, Tensor]
    terms: dict[tuple[int, int], Any]
    alive: list[Alive]


def run_all_ranks(
    plan: Plan,
    model: GPT,
    batches: Sequence[Any],
    weights: Mapping[str, float],
    later: WeightGradients,
    seed: int = 0,
    blocking: bool = False,
) -> Outcome:
    """A step of all ranks of `plan` on a model that has all stages; ranks share its weights and gradient buffers.

    later: of `defer_weight_gradients(model)`. blocking: sends wait until their receives are posted.
    """
    for parameter in model.parameters():
        parameter.main_grad.zero_()
    turns = Turns(seed)
    queues, p = Queues(turns, blocking), plan.schedule.num_ranks
    objective = Objective(dict(weights), {}, frozenset())
    alive = [Alive() for _ in range(p)]

    def share(stage: int, microbatch: int) -> Share:
        return Share(plan.terms.exit_factor(stage, microbatch), plan.terms.final_factor)

    def rank(r: int) -> dict:
        stages = {
            s: Watched(model, model.padded_vocab_size, s, later, alive[r]) for s in range(r, len(model.stages), p)
        }
        step = Step(stages, batches, [None] * len(batches), objective, share)
        return run(plan, r, step, MemoryLink(queues, r))

    found = turns.run([lambda r=r: rank(r) for r in range(p)])
    terms = {key: value for one in found for key, value in one.items()}
    return Outcome({name: q.main_grad.clone() for name, q in model.named_parameters()}, terms, alive)
