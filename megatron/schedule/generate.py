"""Generators of schedules: from a `Pipeline` to the computes of each rank, for any number of microbatches. No torch.

Exit heads run just before the backward of their microbatch, so that one microbatch's exit work is in memory at a time;
`place.place_heads` may move them. Messages are added by `communicate.communicate`. Filling bubbles is in `fill.py`.
"""

from collections.abc import Callable, Iterable

from megatron.schedule.actions import Action, Op, Pipeline, Schedule, ScheduleError

Generator = Callable[[Pipeline], Schedule]


def gpipe(pipeline: Pipeline) -> Schedule:
    """GPipe: all forwards, then all backwards (arXiv 1811.06965)."""
    _needs_one_chunk(pipeline, "gpipe")
    if pipeline.tuning:
        return _tune(pipeline)
    m = pipeline.num_microbatches
    return Schedule.of(alternate(pipeline, stage, range(m), m) for stage in range(pipeline.num_stages))


def one_f_one_b(pipeline: Pipeline) -> Schedule:
    """1F1B: each stage warms up with as many forwards as stages follow it, then alternates (arXiv 2006.09503)."""
    _needs_one_chunk(pipeline, "1f1b")
    if pipeline.tuning:
        return _tune(pipeline)
    p, m = pipeline.num_ranks, pipeline.num_microbatches
    return Schedule.of(alternate(pipeline, stage, range(m), p - 1 - stage) for stage in range(p))


def interleaved(pipeline: Pipeline) -> Schedule:
    """Interleaved 1F1B (arXiv 2104.04473): several stages a rank; microbatches take turns in groups of p.

    Where p does not divide the microbatches, it is the schedule for the next multiple without what is too many: a part
    of an order without cycles has none.
    """
    if pipeline.chunks < 2:
        raise ScheduleError("the interleaved schedule needs at least 2 chunks of layers on each rank: for 1, use 1f1b")
    if pipeline.tuning:
        return _tune(pipeline)
    return Schedule.of(_interleave(pipeline, rank) for rank in range(pipeline.num_ranks))


def zero_bubble_h1(pipeline: Pipeline) -> Schedule:
    """ZB-H1 (arXiv 2401.10241): backward split in two, weight gradients fill the bubble; memory as 1F1B's stage 0.

    Stage s makes weight gradients s microbatches late: its input gradients hurry to the stages below, and what was
    put off fills its idle time at the end. With that, each stage holds at most p microbatches.
    """
    _needs_one_chunk(pipeline, "zb-h1")
    if pipeline.tuning:
        return _tune(pipeline)
    return Schedule.of(_split(pipeline, stage) for stage in range(pipeline.num_stages))


GENERATORS: dict[str, Generator] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "interleaved": interleaved,
    "zb-h1": zero_bubble_h1,
}


def backward_of(pipeline: Pipeline, stage: int, microbatch: int) -> list[Action]:
    """Heads, where the stage has any, then the full backward."""
    ops = (Op.HEADS, Op.BACKWARD) if stage in pipeline.heads else (Op.BACKWARD,)
    return [Action(stage, op, microbatch) for op in ops]


def alternate(pipeline: Pipeline, stage: int, microbatches: Iterable[int], warmup: int) -> list[Action]:
    """`warmup` forwards, then a forward (while any is left) before each backward."""
    order = list(microbatches)
    warmup = min(warmup, len(order))
    actions = [Action(stage, Op.FORWARD, m) for m in order[:warmup]]
    for i, microbatch in enumerate(order):
        actions += [Action(stage, Op.FORWARD, m) for m in order[warmup + i : warmup + i + 1]]
        actions += backward_of(pipeline, stage, microbatch)
    return actions


def _interleave(pipeline: Pipeline, rank: int) -> list[Action]:
    p, chunks = pipeline.num_ranks, pipeline.chunks
    stages = list(pipeline.stages_of(rank))
    groups = range(0, pipeline.num_microbatches, p)
    forwards = [(stage, g + i) for g in groups for stage in stages for i in range(p)]
    backwards = [(stage, g + i) for g in groups for stage in reversed(stages) for i in range(p)]
    warmup = min(len(forwards), 2 * (p - 1 - rank) + (chunks - 1) * p)
    actions = [Action(stage, Op.FORWARD, m) for stage, m in forwards[:warmup]]
    for i, (stage, microbatch) in enumerate(backwards):
        actions += [Action(s, Op.FORWARD, m) for s, m in forwards[warmup + i : warmup + i + 1]]
        actions += backward_of(pipeline, stage, microbatch)
    return [action for action in actions if action.microbatch < pipeline.num_microbatches]


def _split(pipeline: Pipeline, stage: int) -> list[Action]:
    m = pipeline.num_microbatches
    actions = []
    for action in alternate(pipeline, stage, range(m), pipeline.num_ranks - 1 - stage):
        if action.op is not Op.BACKWARD:
            actions.append(action)
            continue
        actions.append(action._replace(op=Op.INPUT))
        if action.microbatch >= stage:
            actions.append(Action(stage, Op.WEIGHT, action.microbatch - stage))
    return actions + [Action(stage, Op.WEIGHT, w) for w in range(max(0, m - stage), m)]


def _tune(pipeline: Pipeline) -> Schedule:
    """Only heads learn: each microbatch runs forward, and heads at once, so that nothing is kept."""
    return Schedule.of(_tune_rank(pipeline, rank) for rank in range(pipeline.num_ranks))


def _tune_rank(pipeline: Pipeline, rank: int) -> list[Action]:
    p, m = pipeline.num_ranks, pipeline.num_microbatches
    turns = [
        (stage, microbatch)
        for group in range(0, m, p)
        for stage in pipeline.stages_of(rank)
        for microbatch in range(group, min(group + p, m))
    ]
    ops = {stage: (Op.FORWARD, Op.HEADS) if stage in pipeline.heads else (Op.FORWARD,) for stage, _ in turns}
    return [Action(stage, op, microbatch) for stage, microbatch in turns for op in ops[stage]]


def _needs_one_chunk(pipeline: Pipeline, name: str) -> None:
    if pipeline.chunks > 1:
        raise ScheduleError(f"{name} has one stage on each rank, not {pipeline.chunks}: use interleaved, or one chunk")
