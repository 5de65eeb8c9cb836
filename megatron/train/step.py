"""One optimizer step, from microbatches to metrics. The page to read first.

Nothing here knows about files or loops: `train_step` is a function of a `Trainer` and the step's microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megatron.exits.loss import Objective, Share
from megatron.exits.spec import FINAL, exit_specs
from megatron.exits.weights import exit_weight
from megatron.model.stage import TokenBatch
from megatron.schedule.execute import Step, run
from megatron.schedule.terms import Terms
from megatron.schedule.trace import Recorder
from megatron.train.losses import gather_losses
from megatron.train.problems import gradient_problem, loss_problem, spike_problem
from megatron.train.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """What one step did: losses (before exit weights) and weights by head label, and the update's figures.

    problem: None, or where a non-finite number or a spike came from; parameters are then untouched. overflow: it may
    be the loss scale's doing (gradients, not losses), and a lower scale the mend.
    """

    losses: dict[str, float]
    weights: dict[str, float]
    lr: float
    grad_norm: float
    loss_scale: float
    applied: bool
    problem: str | None = None
    overflow: bool = False
    confidences: dict[str, float] = field(default_factory=dict)


def train_step(trainer: Trainer, batches: Sequence[TokenBatch], recorder: Recorder | None = None) -> StepReport:
    """Accumulate the gradients of all microbatches, apply them, and move the trainer's progress on.

    recorder: takes the times of the schedule's actions.
    """
    config, progress, optimizer = trainer.config, trainer.progress, trainer.optimizer
    objective = make_objective(trainer, batches)
    sync = optimizer.sync
    plan = trainer.plan(len(batches))
    streams = [trainer.dropout_stream(progress.iteration, m) for m in range(len(batches))]
    share = partial(_share, plan.terms)
    step = Step(trainer.stages, batches, streams, objective, share, sync.reduce, sync.watch, recorder)

    trainer.model.train()
    optimizer.zero_grad()
    terms = run(plan, trainer.mesh.rank("pp"), step, trainer.link)
    sync.finish()

    losses, confidences = gather_losses(trainer.mesh, trainer.partition, plan, terms, objective.dynamic)
    scale = trainer.scaler.scale
    lr, weight_decay = trainer.lr.at(progress.optimizer_samples), trainer.weight_decay.at(progress.optimizer_samples)
    guarded = config.training.check_for_nan_in_loss_and_grad or trainer.scaler.dynamic
    problem = (loss_problem(trainer, losses, terms) if guarded else None) or spike_problem(trainer, losses, terms)
    applied, grad_norm, overflow = False, math.nan, False
    if problem is None:
        limit = trainer.spikes.grad_limit()
        result = optimizer.step(lr, weight_decay, scale, guarded, limit)
        applied, grad_norm = result.applied, result.grad_norm
        overflow = not applied and not math.isfinite(grad_norm)
        trainer.scaler.update(overflow)
        if applied:
            trainer.spikes.note(losses, grad_norm)
        else:
            problem = gradient_problem(trainer, grad_norm, limit)
    _advance(trainer, batches, applied)
    return StepReport(
        losses={label: sum(values) for label, values in losses.items()},
        weights={label: w for label, w in objective.weights.items() if label != FINAL},
        lr=lr,
        grad_norm=grad_norm,
        loss_scale=scale,
        applied=applied,
        problem=problem,
        overflow=overflow,
        confidences={label: sum(values) for label, values in confidences.items()},
    )


def _share(terms: Terms, stage: int, microbatch: int) -> Share:
    return Share(terms.exit_factor(stage, microbatch), terms.final_factor)


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
        scale=trainer.scaler.scale / trainer.mesh.size("dp"),
        mean_tokens=_mean_tokens(trainer, batches) if per_token else None,
    )


def _mean_tokens(trainer: Trainer, batches: Sequence[TokenBatch]) -> Tensor:
    """Unmasked tokens of a microbatch, averaged over the global batch."""
    total = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().double()
    return trainer.mesh.sum(total, "dp").clamp(min=1) / (len(batches) * trainer.mesh.size("dp"))


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
