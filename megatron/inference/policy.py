"""Exit policies: small objects that say which exits are looked at and when a token may leave.

The engine asks; a policy sees numbers only, never tensors, and computes nothing itself.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from megatron.errors import ConfigError
from megatron.exits.spec import ExitSpec


class ExitPolicy(Protocol):
    """What the engine asks. max_deferred: most positions that may wait for deeper layers; None for no limit."""

    @property
    def max_deferred(self) -> int | None: ...

    def evaluates(self, spec: ExitSpec) -> bool:
        """Whether this exit is looked at; exits that are not cost nothing."""
        ...

    def wants_exit(self, spec: ExitSpec, confidence: float) -> bool:
        """Whether the token leaves at this exit, whose top probability is `confidence`."""
        ...


@dataclass(frozen=True)
class ConfidencePolicy:
    """EE-LLM's rule: leave where the top probability reaches `threshold`; the prompt's last position may, too.

    A threshold of 1 or more never exits, one of 0 or less always does. exit_layers: numbers of the exits to look
    at, empty for all. Raises ConfigError for a threshold that is no number, or a negative cap.
    """

    threshold: float
    exit_layers: tuple[int, ...] = ()
    max_deferred: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ConfigError("early-exit threshold: nan is no number; give one of 0..1")
        if self.max_deferred is not None and self.max_deferred < 0:
            raise ConfigError(f"at most {self.max_deferred} deferred tokens: give 0 or more")

    def evaluates(self, spec: ExitSpec) -> bool:
        """Whether `spec` is among the chosen exits and could ever be confident enough."""
        return self.threshold < 1 and (not self.exit_layers or int(spec.label) in self.exit_layers)

    def wants_exit(self, spec: ExitSpec, confidence: float) -> bool:
        """Whether the confidence, in [0, 1], reaches the threshold."""
        return confidence >= self.threshold
