"""The training objective over all exits, and one record per head for the log.

Per step: (1/M) sum over microbatches [ L_final + sum_i w_i L_i ] (EE-LLM, arXiv 2312.04916, eq. 1), times the
loss scale of fp16.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """How the losses of one optimizer step are weighed.

    weights, temperatures: by head label. dynamic: labels of heads with dynamic weighting. scale: what all gradients
    are multiplied by: the loss scale of fp16, and one over the data-parallel ranks. mean_tokens: unmasked tokens of a
    microbatch, averaged over the global batch, where every token counts alike; None where every microbatch does.
    """

    weights: dict[str, float]
    temperatures: dict[str, float]
    dynamic: frozenset[str]
    scale: float = 1.0
    mean_tokens: Tensor | None = None

    def token_weights(self, loss_mask: Tensor) -> Tensor:
        """What each token's loss counts in its microbatch's loss; same shape as the mask.

        A microbatch whose tokens are all masked counts as zero loss.
        """
        tokens = loss_mask.sum().clamp(min=1) if self.mean_tokens is None else self.mean_tokens
        return loss_mask / tokens


@dataclass(frozen=True)
class Share:
    """How the losses of one microbatch on one stage weigh in the step, beside the exits' own weights."""

    exits: float
    final: float


@dataclass(frozen=True)
class LossTerms:
    """One microbatch's losses by head label, before exit weights: scalars on the device.

    confidence: mean top probability, dynamic heads only.
    """

    loss: dict[str, Tensor] = field(default_factory=dict)
    confidence: dict[str, Tensor] = field(default_factory=dict)
