"""The command line is a promise: names, types, defaults and help change only on purpose, and the change is seen here.

Regenerate after such a change: python -m tests.house.test_flags
"""

from collections.abc import Iterator
from pathlib import Path

from megatron.config.fields import all_flags, opposite
from megatron.config.reference import describe
from megatron.config.refused import ACCEPTED, REFUSED_VALUES, refused

SNAPSHOT = Path(__file__).with_name("flags.txt")
REGENERATE = "flags changed; if on purpose: python -m tests.house.test_flags"


def snapshot() -> Iterator[str]:
    """One line for every flag and what it means."""
    for flag in all_flags():
        kind = f"{flag.kind.__name__}{'...' if flag.many else ''}"
        names = [flag.flag, *flag.aliases, *flag.shorthands, *([opposite(flag)] if flag.kind is bool else [])]
        choices = f" {{{','.join(flag.choices)}}}" if flag.choices else ""
        yield f"{' '.join(names)} | {flag.section}.{flag.name} {kind}{choices} = {flag.default!r} | {describe(flag)}"
    for entry in ACCEPTED:
        only = f" only {','.join(entry.only)}" if entry.only else ""
        yield f"{entry.flag} | accepted, {entry.values} value(s){only} | {entry.why}"
    for flag, reason in refused().items():
        yield f"{flag} | refused | {reason}"
    for (flag, value), reason in REFUSED_VALUES.items():
        yield f"{flag} {value} | refused | {reason}"


def test_flags_are_as_promised() -> None:
    promised = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    actual = list(snapshot())
    gone = [f"- {line}" for line in promised if line not in actual]
    new = [f"+ {line}" for line in actual if line not in promised]
    assert actual == promised, "\n".join([REGENERATE, *gone, *new])


def test_every_flag_has_help() -> None:
    assert [flag.flag for flag in all_flags() if not flag.help] == []


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(snapshot()) + "\n", encoding="utf-8")
