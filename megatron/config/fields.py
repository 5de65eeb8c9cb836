"""Config fields as flags: one `Flag` per field of RunConfig with its names, type, choices and help, and how its
value is read from words (command line) or from plain data (JSON, YAML). The single source for parser, help and files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from megatron.config import refused
from megatron.config.run import RunConfig


@dataclass(frozen=True)
class Flag:
    """One config field as the command line sees it."""

    section: str
    name: str
    kind: type  # bool, int, float or str
    many: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    flag: str
    aliases: tuple[str, ...]
    shorthands: Mapping[str, str]
    metavar: str


class Spelling(NamedTuple):
    """What a word with dashes stands for: a flag that takes words, or (`constant`) one value of it."""

    flag: Flag
    constant: Any = None


def _kind(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """Value type, whether there are many of them, and the choices, from a field's annotation."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True, ()
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    return hint, False, ()


def _metavar(kind: type, many: bool, choices: tuple[str, ...]) -> str:
    """How a flag's value is shown in help where the field doesn't say."""
    if kind is bool:
        return ""
    if len(choices) > 5:
        return "NAME"
    one = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
    return f"{one} [{one} ...]" if many else one


@cache
def all_flags() -> tuple[Flag, ...]:
    """Every setting of RunConfig, in its order."""
    found = []
    for section, config_type in get_type_hints(RunConfig).items():
        hints = get_type_hints(config_type)
        for field in fields(config_type):
            meta, (kind, many, choices) = field.metadata, _kind(hints[field.name])
            choices = meta["choices"] or choices
            found.append(
                Flag(
                    section=section,
                    name=field.name,
                    kind=kind,
                    many=many,
                    optional=field.default is None,
                    default=field.default,
                    help=meta["help"],
                    choices=choices,
                    flag=meta["off"] or meta["flag"] or "--" + field.name.replace("_", "-"),
                    aliases=meta["aliases"],
                    shorthands=meta["shorthands"],
                    metavar=meta["metavar"] or _metavar(kind, many, choices),
                )
            )
    return tuple(found)


def opposite(flag: Flag) -> str:
    """The spelling that sets an on/off flag back to its default, so that flags can overrule a config file."""
    bare = flag.name.replace("_", "-")
    return f"--{bare}" if flag.default else "--no-" + flag.flag.removeprefix("--")


@cache
def spellings() -> Mapping[str, Spelling]:
    """Every word with dashes that sets one of our fields."""
    table: dict[str, Spelling] = {}
    for flag in all_flags():
        constant = (not flag.default) if flag.kind is bool else None
        table.update({word: Spelling(flag, constant) for word in (flag.flag, *flag.aliases)})
        table.update({word: Spelling(flag, value) for word, value in flag.shorthands.items()})
        if flag.kind is bool:
            table[opposite(flag)] = Spelling(flag, flag.default)
    return table


@cache
def by_name() -> Mapping[str, Flag]:
    """Flags by field name."""
    return {flag.name: flag for flag in all_flags()}


def _number(kind: type, word: str) -> int | float:
    try:
        value: int | float = int(word) if kind is int else float(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' if kind is int else ''}number") from None
    if not abs(value) < (2**63 if kind is int else math.inf):  # false for nan, too
        raise ValueError(f"{word!r} is not a finite number")
    return value


def _from_word(flag: Flag, word: str) -> Any:
    """One value of a flag from one word of the command line; ValueError says what is wrong with it."""
    if flag.kind is not str:
        return _number(flag.kind, word)
    if flag.choices and word not in flag.choices:
        reason = refused.REFUSED_VALUES.get((flag.flag, word))
        raise ValueError(f"{word}: {reason}" if reason else f"{word!r} is not one of {', '.join(flag.choices)}")
    return word


def from_words(flag: Flag, words: Sequence[str]) -> Any:
    """A flag's value from the words after it; ValueError says what is wrong with them."""
    if flag.many:
        if not words:
            raise ValueError("takes at least one value, got none")
        return tuple(_from_word(flag, word) for word in words)
    if len(words) != 1:
        raise ValueError(f"takes one value, got {' '.join(words) or 'none'}")
    return _from_word(flag, words[0])


def _from_one_plain(flag: Flag, value: Any) -> Any:
    if isinstance(value, str):
        return _from_word(flag, value)  # YAML reads 1e-3 as text
    if isinstance(value, int | float) and not isinstance(value, bool):
        if flag.kind is str and flag.many:
            return str(value)  # the weights of a blend
        if flag.kind is float or (flag.kind is int and isinstance(value, int)):
            return _number(flag.kind, str(value))
    kind = {int: "a whole number", float: "a number", str: "text"}[flag.kind]
    raise ValueError(f"{value!r} is not {kind}")


def from_plain(flag: Flag, value: Any) -> Any:
    """A flag's value from JSON or YAML data; ValueError says what is wrong with it."""
    if value is None and (flag.optional or flag.many):
        return flag.default
    if flag.kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is neither true nor false")
    if flag.many:
        return tuple(_from_one_plain(flag, one) for one in (value if isinstance(value, list | tuple) else [value]))
    return _from_one_plain(flag, value)


def value_of(config: RunConfig, flag: Flag) -> Any:
    """The value that a config holds for a flag."""
    return getattr(getattr(config, flag.section), flag.name)


def build(values: Mapping[str, Any], base: RunConfig) -> RunConfig:
    """`base` with the named fields replaced."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(by_name()[name].section, {})[name] = value
    return replace(base, **{section: replace(getattr(base, section), **some) for section, some in sections.items()})
