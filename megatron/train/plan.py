"""Which schedule a step follows: made from the flags, proved sound, once for each number of microbatches."""

from functools import cache

from megatron.config.parallel import ParallelConfig
from megatron.planning.schedules import make_schedule, read_schedule
from megatron.schedule.actions import Op, Pipeline, ScheduleError
from megatron.schedule.check import validate
from megatron.schedule.communicate import add_reductions, communicate
from megatron.schedule.execute import Plan
from megatron.schedule.simulate import Costs

Counts = tuple[tuple[int, int], ...]  # (stage, gradient buckets)
Buckets = tuple[Counts, Counts]  # of layers, of heads
NONE: Buckets = ((), ())


@cache
def step_plan(parallel: ParallelConfig, pipeline: Pipeline, costs: tuple[Costs, ...], buckets: Buckets = NONE) -> Plan:
    """The plan of a step under these flags.

    costs: of each stage, by which exit heads are placed and bubbles filled. buckets: gradients that this rank sums over
    others as they become whole. Raises ScheduleError where the flags can't be met.
    """
    schedule = make_schedule(parallel, pipeline, costs)
    layers, heads = (dict(counts) for counts in buckets)
    try:
        if not schedule.has_messages:
            schedule = communicate(schedule)
        whole = add_reductions(schedule, layers, heads)
        validate(whole, pipeline, layers, heads)
        return Plan.of(whole, parallel.fill_loss_normalization)
    except ScheduleError as error:
        if parallel.schedule_file is None:
            raise
        raise ScheduleError(f"--schedule-file {parallel.schedule_file}: {error}") from None


def splits_backward(parallel: ParallelConfig) -> bool:
    """Whether gradients of weights are made apart from those of inputs."""
    if parallel.schedule_file is None:
        return parallel.pipeline_schedule == "zb-h1"
    return any(action.op is Op.WEIGHT for rank in read_schedule(parallel.schedule_file) for action in rank)


def filling_in_words(parallel: ParallelConfig, plan: Plan) -> str:
    """How many microbatches of a step fill bubbles, and how many were asked for."""
    terms = plan.terms
    found = (len(terms.warmup), terms.cooldown)
    asked = (parallel.num_fill_warmup_microbatches, parallel.num_fill_cooldown_microbatches)
    kinds = ("warm-up", "cool-down")
    counts = [
        f"{count} {kind}" + (f" (of {wish} asked for)" if wish is not None and wish != count else "")
        for count, kind, wish in zip(found, kinds, asked, strict=True)
    ]
    return f"filling bubbles with {' and '.join(counts)} microbatches of {terms.num_microbatches} a step"
