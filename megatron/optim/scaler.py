"""Loss scaling for fp16: keeps small gradients above the format's smallest number."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """A dynamic loss scale: doubles after `window` clean steps, halves after `hysteresis` overflows.

    With `dynamic` off the scale stays as it is (1 for fp32 and bf16).
    """

    scale: float = 1.0
    dynamic: bool = False
    min_scale: float = 1.0
    window: float = 1000
    hysteresis: int = 2
    clean_steps: int = 0
    overflows_left: int = 2

    def update(self, overflow: bool) -> None:
        """Take note of a step whose gradients were finite, or not."""
        if not self.dynamic:
            return
        if overflow:
            self.clean_steps = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale / 2, self.min_scale)
            return
        self.clean_steps += 1
        if self.clean_steps >= self.window:
            self.clean_steps = 0
            self.overflows_left = self.hysteresis
            self.scale *= 2

    def facts(self) -> dict[str, float | int]:
        """State for a checkpoint."""
        return {
            "scale": self.scale,
            "growth_tracker": self.clean_steps,
            "hysteresis_tracker": self.overflows_left,
        }

    def restore(self, facts: dict[str, float | int]) -> None:
        """Continue from `facts()` (Megatron's grad_scaler state has the same keys). A static scale stays."""
        if self.dynamic and facts:
            self.scale = float(facts["scale"])
            self.clean_steps = int(facts["growth_tracker"])
            self.overflows_left = int(facts["hysteresis_tracker"])
