"""Sizes, times, shares and counts in words, with the digits that matter. No torch."""

from collections.abc import Sequence

GB, MB = 1e9, 1e6


def seconds(time: float) -> str:
    """A time, in seconds or milliseconds."""
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def unit_of(sizes: Sequence[float]) -> str:
    """Of several sizes of memory in bytes: MB where all are below 1 GB, else GB."""
    return "GB" if max(sizes) >= GB else "MB"


def in_unit(size: float, unit: str) -> str:
    """Bytes as a number of GB or MB."""
    return f"{size / GB:.2f}" if unit == "GB" else f"{size / MB:.1f}"


def memory(size: float, unit: str | None = None) -> str:
    """Bytes in GB or MB, whichever fits or is given."""
    unit = unit or unit_of([size])
    return f"{in_unit(size, unit)} {unit}"


def percent(share: float) -> str:
    """A share; what rounds to nothing has no sign."""
    return f"{round(share, 3) + 0.0:.1%}"


def counted(number: int, noun: str) -> str:
    """So many of something: 1 microbatch, 2 microbatches."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("ch") else "s")


def count(parameters: int) -> str:
    """In millions or billions."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
