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


def training_samples(config: TrainingConfig, dp_size: int) -> int:
    """Training length in samples, from --train-samples or --train-iters."""
    if config.train_samples is not None:
        return config.train_samples
    return (config.train_iters or 0) * (config.global_batch_size or config.micro_batch_size * dp_size)
