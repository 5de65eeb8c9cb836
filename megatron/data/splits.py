"""Which documents belong to training, validation and test, and how many samples each needs."""

from megatron.config.mixture import parse_split
from megatron.errors import ConfigError

SPLIT_NAMES = ("train", "valid", "test")


def split_documents(split: str, num_documents: int) -> tuple[range, range, range]:
    """Consecutive document ranges of train, valid and test, rounded as Megatron rounds.

    Every share is rounded by itself (half to even); what the sum is off by is taken from all borders.
    """
    borders = [0]
    for share in parse_split(split):
        borders.append(borders[-1] + round(share * num_documents))
    excess = borders[-1] - num_documents
    # Where the first share is empty Megatron's shift makes a border negative; no document lies there.
    borders[1:] = [max(border - excess, 0) for border in borders[1:]]
    return range(borders[0], borders[1]), range(borders[1], borders[2]), range(borders[2], borders[3])


def samples_per_split(
    train_iters: int, global_batch_size: int, eval_interval: int, eval_iters: int, train_samples: int | None = None
) -> tuple[int, int, int]:
    """Samples that a run of `train_iters` steps asks of train, valid and test.

    Training takes `train_samples` where given, else a global batch a step; validation runs every
    `eval_interval` steps and once at the end, `eval_iters` global batches each; the test runs once.
    """
    if eval_interval < 1:
        raise ConfigError(f"--eval-interval {eval_interval}: must be at least 1")
    evaluation = eval_iters * global_batch_size
    train = train_iters * global_batch_size if train_samples is None else train_samples
    return train, (train_iters // eval_interval + 1) * evaluation, evaluation
