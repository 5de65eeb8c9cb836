"""Puts idle time to use: exit heads where a rank would wait, and as many fillers as cost nothing. No torch.

Both decide by simulation with the costs at hand, so that neither makes the simulated step longer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron.schedule.actions import BACKWARDS, Action, Op, Pipeline, Schedule
from megatron.schedule.fill import fill_bubbles, filler_depths, most_fillers
from megatron.schedule.generate import one_f_one_b
from megatron.schedule.simulate import Costs, Span, Timeline, simulate

ROUNDS = 4  # of placing heads and simulating anew: what moves opens other waits; later rounds find little
SLACK = 1e-9  # relative: sums of floats in another order don't make a step longer


def place_heads(schedule: Schedule, costs: Sequence[Costs], max_ahead: int | None = None) -> Schedule:
    """Move exit heads (E) to where their rank would otherwise wait; the simulated step never gets longer.

    A head runs early only where the wait is long enough for it, oldest microbatch first, so that nothing else starts
    later. max_ahead: a head is moved only while fewer microbatches than that, on its rank, have had their heads run and
    wait for their backward; each keeps the gradients that its heads made (`Costs.heads_kept`).
    """
    best, shortest = schedule, simulate(schedule, costs)
    for _ in range(ROUNDS):
        tried = Schedule.of(_use_waits(spans, max_ahead) for spans in shortest.spans)
        if tried == best or (timeline := simulate(tried, costs)).makespan > shortest.makespan:
            break
        best, shortest = tried, timeline
    return best


@dataclass(frozen=True)
class Filling:
    """What `best_fill` chose. plain: the same complete microbatches alone, with which the filled step is compared."""

    warmup: int
    cooldown: int
    schedule: Schedule
    timeline: Timeline
    plain: Timeline


def best_fill(
    pipeline: Pipeline,
    costs: Sequence[Costs],
    ratio: float | None = None,
    slack: float = SLACK,
    planned_heads: bool = False,
    warmup: int | None = None,
    cooldown: int | None = None,
) -> Filling:
    """As many fillers as leave the step no longer than its complete microbatches alone would take; may be none.

    ratio: time of a backward over that of a forward, which decides how deep fillers go; by default that of the costs.
    slack: by what share the step may be longer. planned_heads: both steps have their heads placed by `place_heads`.
    warmup, cooldown: numbers of fillers that are settled. Warm-up fillers are chosen first, then cool-down ones. Raises
    ScheduleError for pipelines that cannot be filled.
    """
    ratio = _ratio(costs) if ratio is None else ratio
    m = pipeline.num_microbatches

    def attempt(warmup: int, cooldown: int) -> Filling:
        filled = fill_bubbles(pipeline, warmup, cooldown, ratio)
        alone = one_f_one_b(replace(pipeline, num_microbatches=m - warmup - cooldown))
        if planned_heads:
            filled, alone = place_heads(filled, costs), place_heads(alone, costs)
        return Filling(warmup, cooldown, filled, simulate(filled, costs), simulate(alone, costs))

    def fits(filling: Filling) -> bool:
        return filling.timeline.makespan <= filling.plain.makespan * (1 + slack)

    begun = attempt(warmup or 0, cooldown or 0)
    most = most_fillers(pipeline.num_ranks, ratio)
    room = max(0, m - pipeline.num_ranks)
    if warmup is None:
        reach = min(room - begun.cooldown, len(filler_depths(pipeline, most, ratio)))
        begun = _largest(reach, begun, lambda count: attempt(count, begun.cooldown), fits)
    if cooldown is None:
        chosen = begun.warmup
        begun = _largest(min(room - chosen, most), begun, lambda count: attempt(chosen, count), fits)
    return begun


def _largest(most: int, none: Filling, attempt: Callable[[int], Filling], fits: Callable[[Filling], bool]) -> Filling:
    """The filling with the largest count up to `most` that fits, found by halving; `none` where no other does."""
    best, low = none, 0
    while low < most:
        middle = (low + most + 1) // 2
        filling = attempt(middle)
        if fits(filling):
            best, low = filling, middle
        else:
            most = middle - 1
    return best


def _ratio(costs: Sequence[Costs]) -> float:
    """Time of all backwards over that of all forwards; 2 where costs say nothing."""
    forward, backward = sum(c.forward for c in costs), sum(c.input + c.weight for c in costs)
    return backward / forward if forward > 0 and backward > 0 else 2.0


def _use_waits(spans: Sequence[Span], max_ahead: int | None) -> list[Action]:
    """A rank's actions, with heads from further on in its waits."""
    length = {span.action: span.end - span.start for span in spans if span.action.op is Op.HEADS}
    ready: list[Action] = []  # heads whose forward has run, oldest first
    ahead: set[tuple[int, int]] = set()  # (stage, microbatch) between heads and backward
    order: list[Action] = []
    moved: set[Action] = set()
    now = 0.0
    for action, start, end in spans:
        for heads in list(ready) if start > now else ():
            fits = length[heads] > 0 and now + length[heads] <= start
            if fits and (max_ahead is None or len(ahead) < max_ahead):
                now += length[heads]
                order.append(heads)
                moved.add(heads)
                ready.remove(heads)
                ahead.add((heads.stage, heads.microbatch))
        now = end  # where heads were moved away, what follows moves up: that is the gain
        if action in moved:
            continue
        order.append(action)
        if action.op is Op.FORWARD and (heads := action._replace(op=Op.HEADS)) in length:
            ready.append(heads)
        elif action.op is Op.HEADS:
            ready.remove(action)
            ahead.add((action.stage, action.microbatch))
        elif action.op in BACKWARDS:
            ahead.discard((action.stage, action.microbatch))
    return order
