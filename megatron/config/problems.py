"""Many faults, one error: collect what is wrong with a configuration and say it all at once."""

from collections.abc import Iterable

from megatron.errors import ConfigError


def raise_if_any(problems: Iterable[str], where: str = "") -> None:
    """Raise one ConfigError that lists `problems`, one a line; return if there are none.

    `where` names the source (a file, a checkpoint) in front of the list.
    """
    found = list(dict.fromkeys(problems))
    prefix = f"{where}: " if where else ""
    if len(found) == 1:
        raise ConfigError(prefix + found[0])
    if found:
        raise ConfigError("\n  ".join([f"{prefix}{len(found)} settings need mending:", *found]))
