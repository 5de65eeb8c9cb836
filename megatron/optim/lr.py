"""Learning rate and weight decay as pure functions of how many samples the optimizer has seen."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LrSchedule:
    """Linear warm-up from `init_lr` to `max_lr`, then a decay to `min_lr`. All lengths in samples."""

    max_lr: float
    min_lr: float
    style: str
    decay_samples: int
    warmup_samples: float = 0
    init_lr: float = 0.0
    wsd_style: str = "exponential"
    wsd_decay_samples: int = 0

    def at(self, samples: float) -> float:
        """The learning rate once `samples` have been trained on."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.init_lr + (self.max_lr - self.init_lr) * samples / self.warmup_samples
        if self.style == "constant":
            return self.max_lr
        if samples > self.decay_samples:
            return self.min_lr
        if self.style == "inverse-square-root":
            start = max(self.warmup_samples, 1)
            return max(self.min_lr, self.max_lr * math.sqrt(start) / math.sqrt(max(samples, 1)))
        return self.min_lr + self._remaining(samples) * (self.max_lr - self.min_lr)

    def _remaining(self, samples: float) -> float:
        """Share of the way from `min_lr` to `max_lr` that is still left, 1 right after warm-up."""
        if self.style == "WSD":
            return self._wsd(samples)
        length = self.decay_samples - self.warmup_samples
        progress = (samples - self.warmup_samples) / length if length > 0 else 1.0
        return (1 + math.cos(math.pi * progress)) / 2 if self.style == "cosine" else 1 - progress

    def _wsd(self, samples: float) -> float:
        """Warm-up, stable, decay: constant until the last `wsd_decay_samples`."""
        start = self.decay_samples - self.wsd_decay_samples
        if samples <= start or self.wsd_decay_samples == 0:
            return 1.0
        progress = (samples - start) / self.wsd_decay_samples
        shapes = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "exponential": 2 * 0.5**progress - 1,
            "minus_sqrt": 1 - math.sqrt(progress),
        }
        return shapes[self.wsd_style]


@dataclass(frozen=True)
class WeightDecaySchedule:
    """Weight decay from `start` to `end` over `length` samples."""

    start: float
    end: float
    style: str = "constant"
    length: int = 0

    def at(self, samples: float) -> float:
        """Weight decay of decayed parameters once `samples` have been trained on."""
        if self.style == "constant" or samples > self.length or self.length == 0:
            return self.end
        progress = samples / self.length
        if self.style == "cosine":
            progress = (math.cos(math.pi * (1 - progress)) + 1) / 2
        return self.start + progress * (self.end - self.start)
