"""The form that all benchmarks share: `python benchmarks/NAME.py [--quick] [--check] [--output FILE]`.

A readable table, and last one JSON line with each figure, its goal and whether it is met. Figures are ratios of things
measured in the same run wherever that is possible: the median over the rounds of the ratio within a round, which need
not be the ratio of two medians; quartiles say how far to trust it. `--check` ends with 1 where a goal is missed (what
wasn't measured is said apart), `--output` keeps the JSON with rounds, hardware, versions, commit and command
(benchmarks/results/).
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# the package of this checkout, whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron.files import atomic_write


@dataclass(frozen=True)
class Figure:
    """One number. goal: None where there is none; `at_least` says on which side of it to be. None: not measured.

    rounds: what the value is the median of, where it is one.
    """

    name: str
    value: float | None
    unit: str = ""
    goal: float | None = None
    at_least: bool = True
    rounds: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, name: str, rounds: Sequence[float], unit: str = "", goal: float | None = None, at_least: bool = True
    ) -> "Figure":
        """The median over the rounds."""
        return cls(name, statistics.median(rounds), unit, goal, at_least, tuple(rounds))

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """The first and the third; None where there weren't several rounds."""
        if len(self.rounds) < 2:
            return None
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def verdict(self) -> str:
        """Whether the goal is met, in words; "" where there is none or no value."""
        if not self.met:
            return "" if self.met is None else "MISSED"
        low, high = self.quartiles or (self.value, self.value)
        sure = low >= self.goal if self.at_least else high <= self.goal
        return "met" if sure else "met, within the spread"

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is no goal or no value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that all benchmarks share."""
    about = (description or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: shows that it works")
    parser.add_argument("--check", action="store_true", help="end with 1 where a goal is missed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON here, with hardware and versions")
    return parser.parse_args()


def alternate(contestants: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Run each contestant once a round, in turn, so that a busy machine is unfair to none; seconds of each round.

    A contestant on a GPU waits for it before it returns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """One contestant's time over another's, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def finish(name: str, figures: Sequence[Figure], options: argparse.Namespace) -> int:
    """Write table and JSON; returns the exit code."""
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        value = "not measured" if figure.value is None else f"{figure.value:,.4g} {figure.unit}".rstrip()
        if figure.quartiles:
            value += " ({:,.4g} to {:,.4g})".format(*figure.quartiles)
        goal = "" if figure.goal is None else f"goal: {'at least' if figure.at_least else 'at most'} {figure.goal:g}"
        sys.stdout.write(f"{figure.name:<{width}}  {value:>36}  {goal:<20} {figure.verdict}".rstrip() + "\n")
    goals = _count(figures)
    unknown = [figure.name for figure in figures if figure.goal is not None and figure.value is None]
    said = ", ".join(f"{number} {word}" for word, number in goals.items())
    sys.stdout.write(f"goals: {said}" + (f" ({', '.join(unknown)})\n" if unknown else "\n"))
    about = {
        "benchmark": name,
        "quick": options.quick,
        "goals": goals,
        "figures": [asdict(figure) | {"quartiles": figure.quartiles, "met": figure.met} for figure in figures],
    }
    sys.stdout.write(json.dumps(about) + "\n")
    if options.output:
        with atomic_write(str(options.output)) as file:
            file.write(json.dumps(about | machine(), indent=1).encode() + b"\n")
    return int(options.check and goals["missed"] > 0)


def _count(figures: Sequence[Figure]) -> dict[str, int]:
    """How many goals are met, missed or unknown."""
    met = Counter(figure.met for figure in figures if figure.goal is not None)
    return {"met": met[True], "missed": met[False], "not measured": met[None]}


def machine() -> dict[str, object]:
    """Hardware, versions, commit and command, for results that are kept."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": platform.system(),
            **{name: _version(name) for name in ("transformers", "datasets", "tokenizers")},
        },
        "commit": _commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this checkout, with "-dirty" where files differ from it; None where git doesn't know."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
