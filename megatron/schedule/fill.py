"""How many microbatches fit into the bubbles of 1F1B: the counts of EE-LLM's explicit bubble filling. No torch.

arXiv 2312.04916 §3.3 and appendix: with backward r times as long as forward, the first stages can run a few extra
microbatches through part of the pipeline before the first gradient arrives (warm-up), and the last stages can give
a partial backward to a few more at the end (cool-down).
"""

from dataclasses import dataclass


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


def _fit(idle: float, ratio: float, limit: int) -> int:
    """Forward-backward pairs that fit into `idle`, at most `limit`."""
    return max(0, min(limit, int(idle / (1 + ratio))))
