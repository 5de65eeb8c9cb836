"""Which documents belong to training, validation and test, and how many samples each needs."""

import math

from megatron.errors import ConfigError

SPLIT_NAMES = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, summing to 1, from `"969, 30, 1"` (commas or slashes; missing ones are 0)."""
    parts = split.split("," if "," in split else "/")
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        raise ConfigError(f"--split {split}: shares are numbers, as in 969,30,1") from None
    if len(shares) > len(SPLIT_NAMES):
        raise ConfigError(f"--split {split}: at most three shares (train, valid, test), not {len(shares)}")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) == 0:
        raise ConfigError(f"--split {split}: shares are at least 0, and one of them is more")
    shares += [0.0] * (len(SPLIT_NAMES) - len(shares))
    total = sum(shares)
    return shares[0] / total, shares[1] / total, shares[2] / total


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
