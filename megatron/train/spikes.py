"""Spikes: finite losses and gradients so far above the last steps' that one bad batch would spoil the weights."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from megatron.config.training import TrainingConfig
from megatron.errors import CheckpointError
from megatron.exits.spec import FINAL

REMEMBERED = 100  # applied steps that a number is held against
LEAST = 10  # of them before anything is judged: the first losses of a run are no yardstick
GRAD_NORM = "grad_norm"


def loss_name(label: str) -> str:
    """A head's loss in words."""
    return "the final loss" if label == FINAL else f"the loss of exit {label}"


class SpikeWatch:
    """Holds each head's loss, and the gradient norm, against their means over the last applied steps.

    A number above `--spike-factor` times its mean is a spike. What is remembered goes into checkpoints, so that a
    resumed run judges as the uninterrupted one.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._factor = config.spike_factor
        self._losses, self._grads = config.check_for_spiky_loss, config.check_for_large_grads
        self._recent: dict[str, deque[float]] = {}

    def loss_problem(self, losses: Mapping[str, Sequence[float]]) -> str | None:
        """The heads whose loss is a spike, in words; None where there is none.

        losses: by head label, the share of each microbatch in the step's loss.
        """
        if not self._losses:
            return None
        places = [
            f"{loss_name(label)} is {sum(shares):.4g}, more than {self._factor:g} times its mean {mean:.4g} (most of "
            f"it from microbatch {shares.index(max(shares))})"
            for label, shares in losses.items()
            if (mean := self._mean(label)) is not None and sum(shares) > self._factor * mean
        ]
        return "a spike: " + ", ".join(places) if places else None

    def grad_limit(self) -> float | None:
        """The gradient norm above which a step is a spike; None: there is no limit (yet)."""
        mean = self._mean(GRAD_NORM) if self._grads else None
        return None if mean is None else self._factor * mean

    def note(self, losses: Mapping[str, Sequence[float]], grad_norm: float) -> None:
        """Remember an applied step; what isn't finite (nobody checks for it then) is no yardstick."""
        if self._losses or self._grads:
            values = {label: sum(shares) for label, shares in losses.items()} | {GRAD_NORM: grad_norm}
            for name, value in ((name, value) for name, value in values.items() if math.isfinite(value)):
                self._recent.setdefault(name, deque(maxlen=REMEMBERED)).append(value)

    def facts(self) -> dict[str, list[float]]:
        """State for a checkpoint."""
        return {name: list(values) for name, values in self._recent.items()}

    def restore(self, facts: object) -> None:
        """Continue from `facts()`. Raises CheckpointError where it is none."""
        try:
            self._recent = {
                str(name): deque((float(value) for value in values), maxlen=REMEMBERED)
                for name, values in facts.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"spike_watch in the checkpoint's facts is damaged: {error}") from error

    def _mean(self, name: str) -> float | None:
        values = self._recent.get(name, ())
        return sum(values) / len(values) if len(values) >= LEAST else None
