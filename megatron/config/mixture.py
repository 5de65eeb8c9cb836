"""How `--data-path`'s blends and `--split`'s shares are read: one parser for the rules and for the data itself.

Pure functions; a ConfigError names the flag and what is wrong with its words.
"""

import math
from collections.abc import Sequence

from megatron.errors import ConfigError

MAX_DATASETS = 2**15 - 1  # a blend's index holds dataset numbers as int16


def parse_blend(entries: Sequence[str], flag: str) -> tuple[list[str], list[float] | None]:
    """(prefixes, weights as typed) of a data flag's values; weights are None for a lone prefix.

    A dataset of weight 0 is switched off. Raises ConfigError, naming `flag`, for anything that is neither one
    prefix nor weight-prefix pairs.
    """
    prefixes = list(entries if len(entries) == 1 else entries[1::2])
    if not all(prefixes):
        raise ConfigError(f"{flag}: an empty word stands where a prefix should")
    if len(entries) == 1:
        return prefixes, None
    if len(entries) % 2 or not entries:
        raise ConfigError(f"{flag} has {len(entries)} entries: give one prefix, or weight1 prefix1 weight2 prefix2 …")
    if len(prefixes) > MAX_DATASETS:
        raise ConfigError(f"{flag} has {len(prefixes)} datasets; a blend holds at most {MAX_DATASETS}")
    weights = [_weight(word, flag) for word in entries[::2]]
    if not any(weights):
        raise ConfigError(f"{flag}: all weights are 0; give at least one dataset a weight")
    if not math.isfinite(sum(weights)):
        raise ConfigError(f"{flag}: the sum of the weights is too large; only their proportions matter")
    return prefixes, weights


def _weight(word: str, flag: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        raise ConfigError(
            f"{flag}: {word!r} stands where a weight should; give weight1 prefix1 weight2 prefix2 …"
        ) from None
    if not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"{flag}: weight {word} must be a number of at least 0")
    return weight


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, summing to 1, from `"969, 30, 1"`: commas or slashes; missing parts are 0.

    Raises ConfigError naming `--split` for anything else.
    """
    parts = split.replace("/", ",").split(",")
    try:
        shares = [float(part) if part.strip() else 0.0 for part in parts]
    except ValueError:
        raise ConfigError(f"--split {split!r}: shares are numbers, as in 969,30,1") from None
    if len(shares) > 3:
        raise ConfigError(f"--split {split!r}: at most three shares (train, valid, test), not {len(shares)}")
    total = sum(shares)
    if not all(share >= 0 for share in shares) or not 0 < total < math.inf:  # false for nan, too
        raise ConfigError(f"--split {split!r}: shares are finite, at least 0, and one of them is more")
    train, valid, test = (*shares, 0.0, 0.0)[:3]
    return train / total, valid / total, test / total
