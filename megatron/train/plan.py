"""Which schedule a step follows: made from the flags, proved sound, once for each number of microbatches."""

from functools import cache

from megatron.config.parallel import ParallelConfig
from megatron.schedule.actions import Pipeline, Schedule
from megatron.schedule.check import validate
from megatron.schedule.communicate import add_reductions, communicate
from megatron.schedule.execute import Plan
from megatron.schedule.fill import fill_bubbles, most_fillers
from megatron.schedule.generate import GENERATORS

Counts = tuple[tuple[int, int], ...]  # (stage, gradient buckets)
Buckets = tuple[Counts, Counts]  # of layers, of heads
NONE: Buckets = ((), ())


@cache
def step_plan(parallel: ParallelConfig, pipeline: Pipeline, buckets: Buckets = NONE) -> Plan:
    """The plan of a step under these flags. buckets: gradients that this rank sums over others as they become whole.

    Raises ScheduleError where the flags can't be met.
    """
    layers, heads = (dict(counts) for counts in buckets)
    schedule = add_reductions(communicate(_generate(parallel, pipeline)), layers, heads)
    validate(schedule, pipeline, layers, heads)
    return Plan.of(schedule, parallel.fill_loss_normalization)


def _generate(parallel: ParallelConfig, pipeline: Pipeline) -> Schedule:
    if parallel.fill_explicit_bubbles:
        ratio = parallel.backward_forward_ratio
        warmup, cooldown = _fillers(parallel, pipeline)
        return fill_bubbles(pipeline, warmup, cooldown, ratio)
    kind = parallel.pipeline_schedule
    return GENERATORS["interleaved" if kind == "1f1b" and pipeline.chunks > 1 else kind](pipeline)


def _fillers(parallel: ParallelConfig, pipeline: Pipeline) -> tuple[int, int]:
    """Partial microbatches in warm-up and cool-down: as told, else as many as fit the bubbles and the step."""
    most = most_fillers(pipeline.num_ranks, parallel.backward_forward_ratio)
    room = max(pipeline.num_microbatches - pipeline.num_ranks, 0)
    warmup, cooldown = parallel.num_fill_warmup_microbatches, parallel.num_fill_cooldown_microbatches
    if warmup is None:
        warmup = min(most, room - (cooldown or 0) if cooldown is not None else room // 2)
    if cooldown is None:
        cooldown = min(most, room - min(warmup, most))
    return max(warmup, 0), max(cooldown, 0)
