"""Loss weights of exits over time: linear or cosine warm-up (or cool-down). A pure function of the step."""

import math

from megatron.exits.spec import ExitSpec


def exit_weight(spec: ExitSpec, step: int, warmup_iters: int, style: str) -> float:
    """Weight of an exit's loss in the step with index `step` (from 0).

    Goes from `spec.weight_init` to `spec.weight` over `warmup_iters` steps; constant with 0 of them.
    """
    if step >= warmup_iters:
        return spec.weight
    progress = step / warmup_iters
    if style == "cosine":
        progress = (1 + math.cos(math.pi * (progress + 1))) / 2
    return spec.weight_init + progress * (spec.weight - spec.weight_init)
