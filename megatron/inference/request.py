"""What is asked of the engine and what it answers: plain values, checked when made, no tensors."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and how many.

    temperature: 0 is greedy, whatever the rest says. top_k: 0 keeps all; 1 is greedy. top_p: 0 keeps all.
    seed: starts this request's own random stream. Raises ConfigError for values that make no sense.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"tokens to generate: {self.max_new_tokens}; ask for at least one")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature {self.temperature} is not in 0..100 (0: greedy)")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} is not in 0..1 (0 keeps all tokens)")
        if self.top_k and self.top_p:
            raise ConfigError("top-k and top-p cannot both be set: leave one of them at 0")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative; give 0 or more")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0 or self.top_k == 1


class Token(NamedTuple):
    """One emitted token.

    exit: label of the head that emitted it: an exit's number, or "final". confidence: top probability of that head.
    log_prob: of this token under that head, before temperature. seconds: wall time since the token before.
    layer_passes: layers run for it, each over a batch of positions. layer_executions: positions x layers of these.
    """

    id: int
    exit: str
    confidence: float
    log_prob: float
    seconds: float
    layer_passes: int
    layer_executions: int


@dataclass(frozen=True)
class Result:
    """A finished generation. `tokens` includes the end-of-document token where it was emitted; `text` does not."""

    tokens: tuple[Token, ...]
    text: str
    finish_reason: Literal["eod", "length"]

    @property
    def ids(self) -> list[int]:
        """The emitted token ids."""
        return [token.id for token in self.tokens]

    @property
    def seconds(self) -> float:
        """Wall time, reading the prompt included."""
        return sum(token.seconds for token in self.tokens)

    @property
    def layer_passes(self) -> int:
        """Layers run, each over a batch of positions."""
        return sum(token.layer_passes for token in self.tokens)

    @property
    def layer_executions(self) -> int:
        """Positions x layers computed, the prompt's included."""
        return sum(token.layer_executions for token in self.tokens)
