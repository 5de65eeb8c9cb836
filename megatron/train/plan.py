"""Which schedule a step follows: made from the flags, proved sound, once for each number of microbatches."""

from functools import cache
from pathlib import Path

from megatron.config.parallel import ParallelConfig
from megatron.files import read_small
from megatron.schedule.actions import Op, Pipeline, Schedule, ScheduleError, from_text
from megatron.schedule.check import validate
from megatron.schedule.communicate import add_reductions, communicate
from megatron.schedule.execute import Plan
from megatron.schedule.generate import GENERATORS
from megatron.schedule.place import best_fill, place_heads
from megatron.schedule.simulate import Costs

Counts = tuple[tuple[int, int], ...]  # (stage, gradient buckets)
Buckets = tuple[Counts, Counts]  # of layers, of heads
NONE: Buckets = ((), ())
_LARGEST_FILE = 1 << 26  # bytes of a schedule


@cache
def step_plan(parallel: ParallelConfig, pipeline: Pipeline, costs: tuple[Costs, ...], buckets: Buckets = NONE) -> Plan:
    """The plan of a step under these flags.

    costs: of each stage, by which exit heads are placed and bubbles filled. buckets: gradients that this rank sums over
    others as they become whole. Raises ScheduleError where the flags can't be met.
    """
    if parallel.schedule_file is not None:
        return _plan_of_file(parallel, pipeline, buckets)
    schedule = communicate(_generate(parallel, pipeline, costs))
    return _plan(schedule, parallel, pipeline, buckets)


def splits_backward(parallel: ParallelConfig) -> bool:
    """Whether gradients of weights are made apart from those of inputs."""
    if parallel.schedule_file is None:
        return parallel.pipeline_schedule == "zb-h1"
    return any(action.op is Op.WEIGHT for rank in read_schedule(parallel.schedule_file) for action in rank)


def read_schedule(path: str) -> Schedule:
    """A schedule written by hand or by a tool, in its text form. Raises ScheduleError naming file, line and word."""
    try:
        return from_text(read_small(Path(path), _LARGEST_FILE).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"--schedule-file {path} cannot be read: {error}") from error
    except ScheduleError as error:
        raise ScheduleError(f"--schedule-file {path}: {error}") from None


def _plan_of_file(parallel: ParallelConfig, pipeline: Pipeline, buckets: Buckets) -> Plan:
    schedule = read_schedule(parallel.schedule_file)
    try:
        return _plan(schedule if schedule.has_messages else communicate(schedule), parallel, pipeline, buckets)
    except ScheduleError as error:
        raise ScheduleError(f"--schedule-file {parallel.schedule_file}: {error}") from None


def _plan(schedule: Schedule, parallel: ParallelConfig, pipeline: Pipeline, buckets: Buckets) -> Plan:
    layers, heads = (dict(counts) for counts in buckets)
    whole = add_reductions(schedule, layers, heads)
    validate(whole, pipeline, layers, heads)
    return Plan.of(whole, parallel.fill_loss_normalization)


def _generate(parallel: ParallelConfig, pipeline: Pipeline, costs: tuple[Costs, ...]) -> Schedule:
    planned = parallel.exit_placement == "planned"
    if parallel.fill_explicit_bubbles:
        warmup, cooldown = parallel.num_fill_warmup_microbatches, parallel.num_fill_cooldown_microbatches
        ratio = parallel.backward_forward_ratio
        return best_fill(pipeline, costs, ratio, planned_heads=planned, warmup=warmup, cooldown=cooldown).schedule
    kind = parallel.pipeline_schedule
    schedule = GENERATORS["interleaved" if kind == "1f1b" and pipeline.chunks > 1 else kind](pipeline)
    return place_heads(schedule, costs) if planned else schedule
