"""Where an exit sits: the one place that turns flags (layers from 1) into places in the code (layers from 0)."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.model import ExitConfig

Tap = Literal["input", "mlp", "output"]

FINAL = "final"  # label of the last exit: the model's own head


@dataclass(frozen=True)
class ExitSpec:
    """One early exit.

    label: its number as in --exit-layer-nums, as text; names it in logs and checkpoints.
    layer: the layer (from 0) it taps. tap: that layer's input (--pre-exit), its output, or the pair (residual,
    normed input) of its MLP, which an exit-MLP starts from.
    """

    label: str
    layer: int
    tap: Tap
    weight: float
    weight_init: float
    temperature: float


def exit_specs(config: ExitConfig) -> tuple[ExitSpec, ...]:
    """The early exits of a model, shallow first."""
    count = len(config.exit_layer_nums)
    tap: Tap = "input" if config.pre_exit else "mlp" if config.use_exit_mlp else "output"
    rows = zip(
        config.exit_layer_nums,
        config.exit_layer_weight or (1.0,) * count,
        config.exit_layer_weight_init or (0.0,) * count,
        config.exit_layer_temperature or (1.0,) * count,
        strict=True,
    )
    specs = [ExitSpec(str(n), n - 1, tap, weight, init, t) for n, weight, init, t in rows]
    return tuple(sorted(specs, key=lambda spec: spec.layer))
