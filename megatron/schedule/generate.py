"""Generators of schedules: each a function of (stages, microbatches) to per-rank action lists. No torch."""

from megatron.schedule.actions import Action, Op, Schedule


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B: each stage warms up with as many forwards as stages follow it, then alternates."""
    return tuple(
        _interleave(stage, num_microbatches, min(num_stages - 1 - stage, num_microbatches))
        for stage in range(num_stages)
    )


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """GPipe: all forwards, then all backwards."""
    return tuple(_interleave(stage, num_microbatches, num_microbatches) for stage in range(num_stages))


def _interleave(stage: int, num_microbatches: int, warmup: int) -> tuple[Action, ...]:
    """`warmup` forwards, then a forward (while any is left) before each heads-and-backward pair."""
    actions = [Action(stage, Op.FORWARD, m) for m in range(warmup)]
    for m in range(num_microbatches):
        if warmup + m < num_microbatches:
            actions.append(Action(stage, Op.FORWARD, warmup + m))
        actions += [Action(stage, Op.HEADS, m), Action(stage, Op.BACKWARD, m)]
    return tuple(actions)


GENERATORS = {"1f1b": one_f_one_b, "gpipe": gpipe}
