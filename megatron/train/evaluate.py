"""Evaluation of every head: loss, perplexity, next-token accuracy, agreement with the final head."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron.exits.spec import FINAL
from megatron.model.stage import Stage, TokenBatch


@dataclass(frozen=True)
class HeadMetrics:
    """Means over unmasked tokens. loss: plain cross-entropy in nats, without temperature or dynamic weighting."""

    loss: float
    accuracy: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """exp(loss), with the loss capped at 20; NaN stays NaN."""
        return math.exp(min(self.loss, 20.0))


def evaluate(stage: Stage, batches: Iterable[TokenBatch]) -> dict[str, HeadMetrics]:
    """Score every head of the model over `batches`; by head label, shallow first. Empty without batches."""
    stage.model.eval()
    sums: dict[str, torch.Tensor] = {}
    tokens: torch.Tensor | float = 0.0
    for batch in batches:
        scores = stage.evaluate(batch)
        tokens = tokens + batch.loss_mask.sum()
        for label, score in scores.items():
            row = torch.stack((score.loss.double(), score.correct.double(), score.agree.double()))
            sums[label] = sums.get(label, 0) + row
    stage.model.train()
    return {label: HeadMetrics(*(row / max(float(tokens), 1.0)).tolist()) for label, row in sums.items()}


def metric_names(results: dict[str, HeadMetrics]) -> dict[str, float]:
    """Flat names for logs: `loss/final`, `accuracy/exit_6`, ..."""
    flat = {}
    for label, metrics in results.items():
        place = FINAL if label == FINAL else f"exit_{label}"
        flat[f"loss/{place}"] = metrics.loss
        flat[f"ppl/{place}"] = metrics.perplexity
        flat[f"accuracy/{place}"] = metrics.accuracy
        if label != FINAL:
            flat[f"agreement/{place}"] = metrics.agreement
    return flat
