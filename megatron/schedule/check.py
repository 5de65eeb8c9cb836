"""A schedule is checked before it is used: complete, and each microbatch's F, E, B in order. No torch."""

from collections import Counter
from itertools import pairwise

from megatron.schedule.actions import Action, Op, Schedule, ScheduleError


def check(schedule: Schedule, num_microbatches: int) -> None:
    """Raise ScheduleError unless every rank runs F, E, B once per microbatch, in that order."""
    for rank, actions in enumerate(schedule):
        position = {action: place for place, action in enumerate(actions)}
        repeated = [action for action, count in Counter(actions).items() if count > 1]
        if repeated:
            raise ScheduleError(f"rank {rank}: action {repeated[0]} occurs more than once")
        stages = {action.stage for action in actions} or {rank}
        for stage in sorted(stages):
            for microbatch in range(num_microbatches):
                _check_microbatch(rank, stage, microbatch, position)
        extra = [action for action in actions if action.microbatch >= num_microbatches]
        if extra:
            raise ScheduleError(f"rank {rank}: {extra[0]} is beyond the step's {num_microbatches} microbatches")


def _check_microbatch(rank: int, stage: int, microbatch: int, position: dict[Action, int]) -> None:
    order = [Action(stage, op, microbatch) for op in (Op.FORWARD, Op.HEADS, Op.BACKWARD)]
    for action in order:
        if action not in position:
            raise ScheduleError(f"rank {rank}: action {action} is missing")
    for earlier, later in pairwise(order):
        if position[earlier] > position[later]:
            raise ScheduleError(f"rank {rank}: {later} stands before {earlier}")
