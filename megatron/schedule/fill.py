"""Filling the bubbles of 1F1B with partial microbatches (EE-LLM, arXiv 2312.04916 §3.3 and appendix). No torch.

With backward r times as long as forward, the first stages can run a few extra microbatches through part of the pipeline
before the first gradient arrives (warm-up fillers), and the last stages can give a partial backward to a few more at
the end (cool-down fillers). Here are the counts, and the schedule they make. `terms.py` says how each loss then weighs,
`place.best_fill` chooses the counts by simulation.
"""

from dataclasses import dataclass

from megatron.schedule.actions import Action, Op, Pipeline, Schedule, ScheduleError
from megatron.schedule.generate import alternate, backward_of, one_f_one_b


@dataclass(frozen=True)
class StageFill:
    """Counts on one stage; `next_` and `previous_` are the neighbour's, which decide what is sent on."""

    warmup_forwards: int
    partial_forwards: int
    next_partial_forwards: int
    partial_backwards: int
    previous_partial_backwards: int
    cooldown_backwards: int


def most_fillers(num_stages: int, ratio: float = 2.0) -> int:
    """Largest useful number of fillers, in the warm-up and in the cool-down alike."""
    return int((num_stages - 1) * ratio / (1 + ratio))


def stage_fill(num_stages: int, stage: int, warmup: int, cooldown: int, ratio: float = 2.0) -> StageFill:
    """Counts on `stage` when `warmup` and `cooldown` microbatches are used as fillers."""
    before = ratio * (num_stages - 1 - stage) - stage  # idle time before the first gradient, in forwards
    after = ratio * stage  # idle time after the last backward
    backwards = _fit(after, ratio, cooldown)
    forwards_ahead = num_stages - stage
    return StageFill(
        warmup_forwards=forwards_ahead,
        partial_forwards=_fit(before, ratio, warmup),
        next_partial_forwards=_fit(max(0.0, before - ratio - 1), ratio, warmup),
        partial_backwards=backwards,
        previous_partial_backwards=_fit(max(0.0, after - ratio), ratio, cooldown),
        cooldown_backwards=max(0, forwards_ahead - cooldown + backwards),
    )


def filler_depths(pipeline: Pipeline, warmup: int, ratio: float = 2.0) -> list[int]:
    """The deepest stage of each warm-up filler: the last with an exit among those that it has time to reach.

    Shorter than `warmup` where it is more than fits, or where a filler would meet no exit.
    """
    p = pipeline.num_ranks
    counts = [stage_fill(p, stage, warmup, 0, ratio).partial_forwards for stage in range(p)]
    depths = []
    for filler in range(counts[0]):
        exits = [stage for stage in range(p - 1) if filler < counts[stage] and stage in pipeline.heads]
        if exits:
            depths.append(exits[-1])
    return depths


def fill_bubbles(pipeline: Pipeline, warmup: int, cooldown: int, ratio: float = 2.0) -> Schedule:
    """1F1B with fillers among the step's M microbatches; `ratio` is the time of a backward over that of a forward.

    Warm-up fillers are the microbatches p ... p + warmup - 1: each goes forward to its depth, through the heads on its
    way, and back, last in first out; the deepest stage gets no gradient and sends nothing on. Cool-down fillers are the
    last ones: forward everywhere, heads and backward on the last stages only, dropped on the others. Counts above
    `most_fillers` are lowered to it. Raises ScheduleError where M is too small for them.
    """
    if pipeline.tuning or pipeline.chunks > 1:
        raise ScheduleError("filling bubbles needs 1F1B with one stage on each rank: not tuning, and one chunk")
    if not ratio > 0:
        raise ScheduleError(f"the ratio of backward to forward time is above 0, not {ratio}")
    if min(warmup, cooldown) < 0:
        raise ScheduleError(f"numbers of fillers are 0 or more, not {warmup} and {cooldown}")
    p, m = pipeline.num_ranks, pipeline.num_microbatches
    depths = filler_depths(pipeline, warmup, ratio)
    cooldown = min(cooldown, most_fillers(p, ratio))
    if not depths and not cooldown:
        return one_f_one_b(pipeline)
    if m < p + len(depths) + cooldown:
        raise ScheduleError(
            f"{m} microbatches are too few for {len(depths)} warm-up and {cooldown} cool-down fillers on {p} stages: "
            f"take {p + len(depths) + cooldown} or more, or fewer fillers"
        )
    return Schedule.of(_fill_stage(pipeline, stage, depths, (cooldown, ratio)) for stage in range(p))


def _fill_stage(pipeline: Pipeline, stage: int, depths: list[int], cooling: tuple[int, float]) -> list[Action]:
    p, m = pipeline.num_ranks, pipeline.num_microbatches
    cooldown, ratio = cooling
    fillers = [p + i for i, depth in enumerate(depths) if stage <= depth]
    backward = stage_fill(p, stage, 0, cooldown, ratio).partial_backwards
    dropped = range(m - cooldown + backward, m)
    whole = [i for i in range(m) if not p <= i < p + len(depths)]

    fill = [Action(stage, Op.FORWARD, i) for i in fillers]
    for i in reversed(fillers):
        fill += backward_of(pipeline, stage, i)
    main: list[Action] = []
    for action in alternate(pipeline, stage, whole, p - 1 - stage):
        if action.microbatch not in dropped:
            main.append(action)
        elif action.op is Op.FORWARD:
            main += [action, action._replace(op=Op.DROP)]  # at once: nobody comes back to it
    before = p - stage  # forwards ahead of the first backward
    return main[:before] + fill + main[before:]


def _fit(idle: float, ratio: float, limit: int) -> int:
    """Forward-backward pairs that fit into `idle`, at most `limit`."""
    return max(0, min(limit, int(idle / (1 + ratio))))
