"""The training objective over all exits, and one record per head for the log.

Per step: (1/M) sum over microbatches [ L_final + sum_i w_i L_i ] (EE-LLM, arXiv 2312.04916, eq. 1), times the
loss scale of fp16.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """How the losses of one optimizer step are weighed.

    weights, temperatures: by head label. dynamic: labels of heads with dynamic weighting. total_tokens: unmasked
    tokens of the global batch where every token counts alike; None for the mean of per-microbatch masked means.
    """

    weights: dict[str, float]
    temperatures: dict[str, float]
    dynamic: frozenset[str]
    num_microbatches: int
    loss_scale: float = 1.0
    total_tokens: Tensor | None = None

    def token_weights(self, loss_mask: Tensor) -> Tensor:
        """What each token's loss counts towards the step's mean; same shape as the mask.

        A microbatch whose tokens are all masked counts as zero loss.
        """
        if self.total_tokens is not None:
            return loss_mask / self.total_tokens.clamp(min=1)
        return loss_mask / (loss_mask.sum().clamp(min=1) * self.num_microbatches)


@dataclass(frozen=True)
class LossTerms:
    """One microbatch's share of the step's loss, by head label, before exit weights: scalars on the device.

    Summed over microbatches they are the step's losses. confidence: mean top probability, dynamic heads only.
    """

    loss: dict[str, Tensor] = field(default_factory=dict)
    confidence: dict[str, Tensor] = field(default_factory=dict)
