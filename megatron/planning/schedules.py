"""The schedule that a run's flags ask for, for training and prediction alike. No torch."""

from pathlib import Path

from megatron.config.parallel import ParallelConfig
from megatron.files import read_small
from megatron.schedule.actions import Pipeline, Schedule, ScheduleError, from_text
from megatron.schedule.generate import GENERATORS
from megatron.schedule.place import best_fill, place_heads
from megatron.schedule.simulate import Costs

_LARGEST_FILE = 1 << 26  # bytes of a schedule


def make_schedule(parallel: ParallelConfig, pipeline: Pipeline, costs: tuple[Costs, ...]) -> Schedule:
    """The computes of a step; from a file, with the messages that it has.

    costs: of each stage, by which exit heads are placed and bubbles filled. Raises ScheduleError for what can't be.
    """
    if parallel.schedule_file is not None:
        return read_schedule(parallel.schedule_file)
    planned = parallel.exit_placement == "planned"
    if parallel.fill_explicit_bubbles:
        warmup, cooldown = parallel.num_fill_warmup_microbatches, parallel.num_fill_cooldown_microbatches
        ratio = parallel.backward_forward_ratio
        return best_fill(pipeline, costs, ratio, planned_heads=planned, warmup=warmup, cooldown=cooldown).schedule
    kind = parallel.pipeline_schedule
    schedule = GENERATORS["interleaved" if kind == "1f1b" and pipeline.chunks > 1 else kind](pipeline)
    return place_heads(schedule, costs) if planned else schedule


def read_schedule(path: str) -> Schedule:
    """A schedule written by hand or by a tool, in its text form. Raises ScheduleError naming file, line and word."""
    try:
        return from_text(read_small(Path(path), _LARGEST_FILE).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"--schedule-file {path} cannot be read: {error}") from error
    except ScheduleError as error:
        raise ScheduleError(f"--schedule-file {path}: {error}") from None
