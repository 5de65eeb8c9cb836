"""Evaluation of every head: loss, perplexity, next-token accuracy, agreement with the final head."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from megatron.exits.spec import FINAL
from megatron.model.partition import stages_of_rank
from megatron.model.stage import Stage, TokenBatch, head_scores
from megatron.nn.cross_entropy import HeadLoss
from megatron.parallel.p2p import UP
from megatron.train.trainer import Trainer

_WINDOW = 8  # microbatches that go through a pipeline before their heads are compared


@dataclass(frozen=True)
class HeadMetrics:
    """Means over unmasked tokens. loss: plain cross-entropy in nats, without temperature or dynamic weighting.
    agreement: with the final head; NaN where that isn't loaded."""

    loss: float
    accuracy: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """exp(loss), with the loss capped at 20; NaN stays NaN."""
        return math.exp(min(self.loss, 20.0))


def evaluate(trainer: Trainer, batches: Iterable[TokenBatch]) -> dict[str, HeadMetrics]:
    """Score every head of the model over all ranks' `batches`, as many on each; by head label, shallow first.

    The same on every rank; empty without batches. Where exits alone train, the rest is run as far as it is loaded.
    """
    mesh, partition = trainer.mesh, trainer.partition
    if partition[-1].is_last:
        partition = tuple(stage.whole for stage in partition)
    labels = [label for stage in partition for label in stage.heads]
    mine = stages_of_rank(partition, mesh.rank("pp"), mesh.size("pp"))
    stages = {spec.index: Stage(trainer.model, trainer.vocab_size, spec) for spec in mine}
    trainer.model.eval()
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=mesh.backend.device)
    tokens = torch.zeros((), dtype=torch.float64, device=mesh.backend.device)
    batches = iter(batches)
    size = 1 if trainer.link is None else _WINDOW
    while window := list(islice(batches, size)):
        scored = [_forward(trainer, stages, batch) for batch in window]
        for batch, heads in zip(window, scored, strict=True):
            tokens += batch.loss_mask.sum()
            final = heads[FINAL].argmax if FINAL in heads else torch.zeros_like(batch.labels).t().flatten()
            mesh.broadcast(final, "pp", partition[-1].index % mesh.size("pp"))
            if mesh.rank("tp") == 0:
                for label, score in head_scores(heads, final, batch).items():
                    row = (score.loss.double(), score.correct.double(), score.agree.double())
                    sums[labels.index(label)] += torch.stack(row)
    if trainer.link is not None:
        trainer.link.finish()
    count = float(mesh.sum(tokens, "dp"))
    if not count:
        return {}
    means = mesh.sum(sums) / count
    if FINAL not in labels:
        means[:, 2] = math.nan
    return {label: HeadMetrics(*row) for label, row in zip(labels, means.tolist(), strict=True)}


@torch.no_grad()
def _forward(trainer: Trainer, stages: dict[int, Stage], batch: TokenBatch) -> dict[str, HeadLoss]:
    """One microbatch through this rank's stages: taken from the rank before, handed to the one after."""
    ranks, heads, hidden = trainer.mesh.size("pp"), {}, None
    for index, stage in stages.items():
        if index and ranks > 1:
            hidden = stage.empty_message(batch)
            trainer.link.receive(hidden, (index - 1) % ranks, UP).wait()
        activations = stage.forward(batch, None, hidden)
        heads |= stage.score(activations, batch)
        hidden = activations.hidden
        if index + 1 < len(trainer.partition) and ranks > 1:
            trainer.link.send(hidden, (index + 1) % ranks, UP)
    return heads


def metric_names(results: dict[str, HeadMetrics]) -> dict[str, float]:
    """Flat names for logs: `loss/final`, `accuracy/exit_6`, ..."""
    flat = {}
    for label, metrics in results.items():
        place = FINAL if label == FINAL else f"exit_{label}"
        flat[f"loss/{place}"] = metrics.loss
        flat[f"ppl/{place}"] = metrics.perplexity
        flat[f"accuracy/{place}"] = metrics.accuracy
        if FINAL in results and label != FINAL:
            flat[f"agreement/{place}"] = metrics.agreement
    return flat
