"""Flags described for people: `--help`, and the tables of the documentation. Pure text, made from the same tables
that the parser reads.
"""

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from megatron.config import refused
from megatron.config.fields import Flag, all_flags
from megatron.config.run import RunConfig

_INDENT = 28


def describe(flag: Flag) -> str:
    """A flag's help sentence with its default and other names."""
    text = flag.help
    if flag.metavar == "NAME" and flag.choices:
        text += f" One of {', '.join(flag.choices)}."
    if flag.kind is bool and flag.default:
        text = f"Switch off: {text if text[:2].isupper() else text[:1].lower() + text[1:]}"
    elif not (flag.kind is bool or flag.optional or flag.many):
        text += f" (default: {format(flag.default, '.12g' if flag.kind is float else '')})"
    others = [f"{word} = {value}" for word, value in flag.shorthands.items()]
    if flag.aliases:
        others.append("also " + ", ".join(flag.aliases))
    return f"{text} [{'; '.join(others)}]" if others else text


def sections() -> dict[str, tuple[str, list[Flag]]]:
    """Section name → its purpose (the first line of its docstring) and flags, in order."""
    default = RunConfig()
    result: dict[str, tuple[str, list[Flag]]] = {}
    for flag in all_flags():
        purpose = (type(getattr(default, flag.section)).__doc__ or "").partition("\n")[0]
        result.setdefault(flag.section, (purpose, []))[1].append(flag)
    return result


def _entry(name: str, text: str, width: int) -> Iterator[str]:
    """One line of help, or more where the flag or its text is long."""
    lines = textwrap.wrap(text, width - _INDENT, break_on_hyphens=False)
    head = f"  {name}"
    if len(head) < _INDENT - 1:
        yield head.ljust(_INDENT) + lines.pop(0)
    else:
        yield head
    yield from (" " * _INDENT + line for line in lines)


def help_text(entry: str) -> str:
    """What `--help` prints: every flag that has an effect, in sections; `entry` is the command's name."""
    width = max(72, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = [
        f"usage: {entry} [--config FILE] [flags]",
        "",
        "For a new model: --num-layers --hidden-size --num-attention-heads --seq-length",
        "To train it: --data-path --tokenizer-type --train-iters --lr",
        "With early exits: --exit-layer-nums",
        "",
        *_entry("--config FILE", "YAML or JSON file with the same names as keys; flags overrule it.", width),
        *_entry("--help, -h", "This text.", width),
    ]
    for section, (purpose, some) in sections().items():
        lines += ["", f"{section.replace('_', ' ').upper()}: {purpose}"]
        for flag in some:
            lines += _entry(f"{flag.flag} {flag.metavar}".rstrip(), describe(flag), width)
    lines += [
        "",
        "Every on/off flag has an opposite that overrules a config file: --swiglu, --no-swiglu;",
        "--no-save-optim, --save-optim.",
        "",
        "Other flags of Megatron-LM and EE-LLM are taken where they change nothing here (said once at the",
        "start), and refused with the reason otherwise. README_Megatron_LM.md lists them.",
    ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {line} |" for line in lines]


def markdown() -> str:
    """All flags in their three classes, as markdown tables for the documentation."""
    lines = ["### Honoured", ""]
    for section, (purpose, some) in sections().items():
        lines += [f"**{section.replace('_', ' ')}** · {purpose}", ""]
        rows = ((f"`{f'{flag.flag} {flag.metavar}'.rstrip()}`", describe(flag)) for flag in some)
        lines += [*_table(("flag", "meaning"), rows), ""]
    lines += ["### Accepted without effect", ""]
    taken = ((f"`{entry.flag}`", _taken(entry)) for entry in refused.ACCEPTED)
    lines += [*_table(("flag", "why"), taken), "", "### Refused", ""]
    by_reason: dict[str, list[str]] = {}
    for flag, reason in refused.refused().items():
        by_reason.setdefault(reason, []).append(f"`{flag}`")
    for (flag, value), reason in refused.REFUSED_VALUES.items():
        by_reason.setdefault(reason, []).append(f"`{flag} {value}`")
    rows = ((", ".join(flags), reason) for reason, flags in by_reason.items())
    return "\n".join([*lines, *_table(("flag", "reason"), rows)]) + "\n"


def _taken(entry: refused.Accepted) -> str:
    """Why a flag has no effect, and which values it is limited to."""
    if not entry.otherwise:
        return entry.why
    return f"{entry.why} (only {', '.join(entry.only)}; else {entry.otherwise})"
