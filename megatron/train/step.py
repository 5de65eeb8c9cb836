"""One optimizer step, from microbatches to metrics. The page to read first.

Nothing here knows about files or loops: `train_step` is a function of a `Trainer` and the step's microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron.exits.loss import LossTerms, Objective
from megatron.exits.spec import FINAL, exit_specs
from megatron.exits.weights import exit_weight
from megatron.model.stage import TokenBatch
from megatron.schedule.check import check
from megatron.schedule.execute import run
from megatron.schedule.generate import GENERATORS
from megatron.train.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """What one step did: losses (before exit weights) and weights by head label, and the update's figures.

    problem: None, or where a non-finite number came from; parameters are then untouched.
    """

    losses: dict[str, float]
    weights: dict[str, float]
    lr: float
    grad_norm: float
    loss_scale: float
    applied: bool
    problem: str | None = None
    confidences: dict[str, float] = field(default_factory=dict)


def train_step(trainer: Trainer, batches: Sequence[TokenBatch]) -> StepReport:
    """Accumulate the gradients of all microbatches, apply them, and move the trainer's progress on."""
    config, progress, optimizer = trainer.config, trainer.progress, trainer.optimizer
    objective = make_objective(trainer, batches)
    schedule = GENERATORS[config.parallel.pipeline_schedule](trainer.mesh.size("pp"), len(batches))
    check(schedule, len(batches))
    streams = [trainer.dropout_stream(progress.iteration, m) for m in range(len(batches))]

    trainer.model.train()
    optimizer.zero_grad()
    terms = run(schedule[trainer.mesh.rank("pp")], trainer.stage, batches, streams, objective)

    losses = _to_host(terms)
    lr, weight_decay = trainer.lr.at(progress.optimizer_samples), trainer.weight_decay.at(progress.optimizer_samples)
    guarded = config.training.check_for_nan_in_loss_and_grad or trainer.scaler.dynamic
    problem = _find_problem(losses) if guarded else None
    if problem is None:
        result = optimizer.step(lr, weight_decay, objective.loss_scale, guarded)
        applied, grad_norm = result.applied, result.grad_norm
        if not applied:
            problem = "the gradient norm is not finite"
        trainer.scaler.update(overflow=not applied)
    else:
        applied, grad_norm = False, math.nan
    _advance(trainer, batches, applied)
    return StepReport(
        losses={label: sum(values) for label, values in losses.items()},
        weights={label: w for label, w in objective.weights.items() if label != FINAL},
        lr=lr,
        grad_norm=grad_norm,
        loss_scale=objective.loss_scale,
        applied=applied,
        problem=problem,
        confidences=_mean_confidences(terms),
    )


def make_objective(trainer: Trainer, batches: Sequence[TokenBatch]) -> Objective:
    """The weights of this step's losses."""
    exits = trainer.config.exits
    specs = exit_specs(exits)
    weights = {
        spec.label: exit_weight(
            spec,
            trainer.progress.iteration,
            exits.exit_layer_weight_warmup_iters,
            exits.exit_layer_weight_warmup_style,
        )
        for spec in specs
    }
    per_token = trainer.config.training.calculate_per_token_loss
    return Objective(
        weights={**weights, FINAL: 1.0},
        temperatures={spec.label: spec.temperature for spec in specs},
        dynamic=frozenset(weights) if exits.use_dynamic_exit_layer_weight else frozenset(),
        num_microbatches=len(batches),
        loss_scale=trainer.scaler.scale,
        total_tokens=int(sum(batch.loss_mask.sum() for batch in batches)) if per_token else None,
    )


def _to_host(terms: Sequence[LossTerms]) -> dict[str, list[float]]:
    """Loss shares by label and microbatch, in one transfer."""
    labels = list(terms[0].loss)
    table = torch.stack([torch.stack([term.loss[label] for label in labels]) for term in terms]).tolist()
    return {label: [row[i] for row in table] for i, label in enumerate(labels)}


def _mean_confidences(terms: Sequence[LossTerms]) -> dict[str, float]:
    return {label: float(sum(term.confidence[label] for term in terms)) for label in terms[0].confidence}


def _find_problem(losses: dict[str, list[float]]) -> str | None:
    """Which heads and microbatches have a non-finite loss, in words."""
    places = [
        f"{'the final loss' if label == FINAL else f'the loss of exit {label}'} in microbatch {m}"
        for label, values in losses.items()
        for m, value in enumerate(values)
        if not math.isfinite(value)
    ]
    if not places:
        return None
    more = f" (and {len(places) - 4} more)" if len(places) > 4 else ""
    return ", ".join(places[:4]) + more + " is not finite"


def _advance(trainer: Trainer, batches: Sequence[TokenBatch], applied: bool) -> None:
    """Count the step. Schedules of learning rate and weight decay stand still on skipped steps."""
    progress = trainer.progress
    samples = sum(len(batch.tokens) for batch in batches) * trainer.mesh.size("dp")
    progress.iteration += 1
    progress.consumed_samples += samples
    if applied:
        progress.optimizer_samples += samples
    else:
        progress.skipped_steps += 1
