"""How a config field declares its command-line flag: one call per field, read by `flags.py`.

A field is named as Megatron-LM names the parsed attribute, so its flag is `--` + the name with dashes unless
`flag` says otherwise. `off` names the flag that switches a true-by-default field off. `aliases` are further names of
the flag; `shorthands` are flags without a value that stand for one value of the field.
"""

from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any


def setting(  # noqa: PLR0913 - one keyword per property of a flag
    default: Any = MISSING,
    help: str = "",
    *,
    flag: str | None = None,
    off: str | None = None,
    choices: tuple[str, ...] | None = None,
    aliases: tuple[str, ...] = (),
    shorthands: Mapping[str, str] | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a config field: its default, help text and, where they differ from the name, its flags."""
    return field(
        default=default,
        metadata={
            "help": help, "flag": flag, "off": off, "choices": choices,
            "aliases": aliases, "shorthands": shorthands or {}, "metavar": metavar,
        },
    )  # fmt: skip
