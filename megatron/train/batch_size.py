"""Global batch size over time: constant, or ramped up with the samples consumed. Pure functions."""

from megatron.config.training import TrainingConfig


def global_batch_size(config: TrainingConfig, consumed_samples: int, dp_size: int) -> int:
    """Sequences in the optimizer step that starts after `consumed_samples`.

    Ramp-up (START, INCREMENT, SAMPLES): the batch grows by INCREMENT, each size lasting SAMPLES divided by the
    number of increments, and is rounded down to whole microbatches on all dp ranks.
    """
    final = config.global_batch_size or config.micro_batch_size * dp_size
    if not config.rampup_batch_size:
        return final
    start, increment, ramp_samples = config.rampup_batch_size
    steps = (final - start) // increment
    if steps == 0 or consumed_samples > ramp_samples:
        return final
    size = min(start + int(consumed_samples / (ramp_samples / steps)) * increment, final)
    unit = config.micro_batch_size * dp_size
    return max(size // unit, 1) * unit


def global_batch_sizes(config: TrainingConfig, dp_size: int) -> list[int]:
    """All sizes that a run's steps have, smallest first."""
    final = global_batch_size(config, 1 << 62, dp_size)
    if not config.rampup_batch_size:
        return [final]
    start, increment, _ = config.rampup_batch_size
    unit = config.micro_batch_size * dp_size
    return sorted({max(size // unit, 1) * unit for size in range(start, final, increment)} | {final})


def training_length(config: TrainingConfig, dp_size: int) -> tuple[int, int]:
    """(iterations, samples) of the whole run. Sample-based runs end before the step that would exceed them."""
    final = global_batch_size(config, 1 << 62, dp_size)
    if config.train_samples is None:
        iterations = config.train_iters or 0
        return iterations, iterations * final
    iterations = consumed = 0
    while (size := global_batch_size(config, consumed, dp_size)) != final and consumed + size <= config.train_samples:
        consumed += size
        iterations += 1
    return iterations + max(0, config.train_samples - consumed) // final, config.train_samples


def is_finished(config: TrainingConfig, iteration: int, consumed_samples: int, dp_size: int) -> bool:
    """Whether the run has no further step."""
    if config.train_samples is None:
        return iteration >= (config.train_iters or 0)
    return consumed_samples + global_batch_size(config, consumed_samples, dp_size) > config.train_samples
