"""Training runs driven step by step inside one process, for tests that change something on the way."""

from collections.abc import Sequence
from dataclasses import replace

from megatron.config.load import load
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.data import make_datasets, microbatches, step_batches
from megatron.train.step import train_step


def train_changing_micro_batch(
    argv: Sequence[str], at: int, micro_batch_size: int
) -> list[tuple[dict[str, float], float]]:
    """Run to the end without a stop, with another micro-batch size from iteration `at` on, and save.

    Returns each step's (loss of each head, gradient norm).
    """
    trainer = build_trainer(load(argv).config)
    checkpoints.start(trainer)
    datasets = make_datasets(trainer)
    stream = microbatches(trainer, datasets.train, 0)
    rows = []
    while trainer.progress.iteration < trainer.config.training.train_iters:
        if trainer.progress.iteration == at:
            training = replace(trainer.config.training, micro_batch_size=micro_batch_size)
            trainer.config = replace(trainer.config, training=training)
            stream = microbatches(trainer, datasets.train, trainer.progress.consumed_samples)
        report = train_step(trainer, step_batches(trainer, stream))
        rows.append((dict(report.losses), report.grad_norm))
    checkpoints.save(trainer)
    return rows
