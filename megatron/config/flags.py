"""Command line ↔ config: reads flags into values, and writes a config back as flags.

argparse only cuts the command line into (flag, words); what they mean is decided here, so that all faults are
reported together. Config files are read into the same `Answers`.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from megatron.config import refused
from megatron.config.fields import Flag, all_flags, from_words, spellings, value_of
from megatron.config.reference import help_text
from megatron.config.run import RunConfig
from megatron.errors import ConfigError

# Old Llama scripts ask for rotary positions *and* for no learned ones: the first says it all.
_YIELDING = "--no-position-embedding"


class Answers:
    """What one source (command line or file) says: values by field, flags to mention, and all its faults."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.accepted: list[str] = []
        self.problems: list[str] = []
        self._spelled: dict[str, str] = {}

    def set(self, flag: Flag, value: Any, spelled: str) -> None:
        """Record a value. Repeating a flag overrules; two spellings that contradict each other are a fault."""
        before = self._spelled.get(flag.name)
        if before is not None and before != spelled and self.values[flag.name] != value:
            if spelled == _YIELDING:
                return
            if before != _YIELDING:
                self.problems.append(f"{before} and {spelled} contradict each other: give one of them")
                return
        self.values[flag.name], self._spelled[flag.name] = value, spelled

    def read(self, spelled: str, words: Sequence[str]) -> None:
        """Take one flag with its words from the command line."""
        if spelled not in spellings():
            self.foreign(spelled, words)
            return
        flag, constant = spellings()[spelled]
        try:
            value = from_words(flag, words) if constant is None else _no_words(words, constant)
        except ValueError as error:
            self.problems.append(f"{spelled}: {error}")
        else:
            self.set(flag, value, spelled)

    def foreign(self, spelled: str, words: Sequence[str]) -> None:
        """Take a flag that is no setting of ours: accepted, refused, or unknown."""
        entry = refused.accepted().get(spelled)
        if entry is None:
            reason = refused.refused().get(spelled)
            self.problems.append(f"{spelled}: {reason}" if reason else unknown(spelled, known_flags()))
        elif len(words) != entry.values:
            count = "one value" if entry.values else "no value"
            self.problems.append(f"{spelled}: takes {count}, got {' '.join(words) or 'none'}")
        elif entry.only and words[0] not in entry.only:
            reason = entry.otherwise or f"not one of {', '.join(entry.only)}"
            self.problems.append(f"{spelled} {words[0]}: {reason}")
        else:
            self.accepted.append(spelled)


def _no_words(words: Sequence[str], constant: Any) -> Any:
    if words:
        raise ValueError(f"takes no value, got {' '.join(words)}")
    return constant


@cache
def known_flags() -> tuple[str, ...]:
    """Every flag that is honoured, accepted or refused."""
    return (*spellings(), *refused.accepted(), *refused.refused(), "--config", "--help")


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest one that isn't."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"{name}: unknown" + (f"; did you mean {near[0]}?" if near else "; --help lists what there is")


class _Record(argparse.Action):
    """Note each flag with its words, in order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.given.append((option_string, list(values)))


class _Parser(argparse.ArgumentParser):
    """argparse with our help text and our errors."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)

    def format_help(self) -> str:
        return help_text(self.prog)


@cache
def parser(entry: str) -> argparse.ArgumentParser:
    """A parser that knows every flag by name; `entry` is the command shown in its help."""
    result = _Parser(prog=entry, allow_abbrev=False)
    for word in known_flags():
        if word != "--help":
            result.add_argument(word, dest=word, action=_Record, nargs="*", default=argparse.SUPPRESS)
    return result


def read_argv(argv: Sequence[str], entry: str) -> tuple[Answers, str | None]:
    """Read a command line; returns its answers, faults among them, and the `--config` file it names.

    `--help` prints and exits with 0.
    """
    namespace, rest = parser(entry).parse_known_args(list(argv), argparse.Namespace(given=[]))
    answers, config_file = Answers(), None
    for word, words in namespace.given:
        if word != "--config":
            answers.read(word, words)
        elif len(words) == 1:
            config_file = words[0]
        else:
            answers.problems.append(f"--config: takes one file, got {' '.join(words) or 'none'}")
    answers.problems += _leftovers(rest)
    return answers, config_file


def _leftovers(rest: Sequence[str]) -> Iterable[str]:
    """Faults for words that belong to no flag; the values of an unknown flag go with it."""
    after_unknown = False
    for word in rest:
        if word.startswith("-"):
            after_unknown = True
            yield unknown(word.partition("=")[0], known_flags())
        elif not after_unknown:
            yield f"unexpected {word!r}: it follows no flag that takes it"


def to_argv(config: RunConfig) -> list[str]:
    """The flags that make `config`: only what differs from the defaults, in order."""
    argv: list[str] = []
    for flag in all_flags():
        value = value_of(config, flag)
        if value == flag.default:
            continue
        if flag.kind is bool:
            argv.append(flag.flag)
        elif flag.many:
            argv += [flag.flag, *map(str, value)]
        else:  # the joined form keeps a value that looks like a flag, or is empty, in its place
            argv += [f"{flag.flag}={value}"] if str(value)[:1] in ("-", "") else [flag.flag, str(value)]
    return argv
