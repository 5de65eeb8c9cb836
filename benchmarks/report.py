"""The form that all benchmarks share: `python benchmarks/NAME.py [--quick] [--check] [--output FILE]`.

A readable table, and last one JSON line with each figure, its goal and whether it is met. Figures are ratios of things
measured in the same run wherever that is possible. `--check` ends with 1 where a goal is missed, `--output` keeps the
JSON with hardware, versions and command (benchmarks/results/).
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# the package of this checkout, whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron.files import atomic_write


@dataclass(frozen=True)
class Figure:
    """One number. goal: None where there is none; `at_least` says on which side of it to be. None: not measured."""

    name: str
    value: float | None
    unit: str = ""
    goal: float | None = None
    at_least: bool = True

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


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of one contestant's time over another's."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def finish(name: str, figures: Sequence[Figure], options: argparse.Namespace) -> int:
    """Write table and JSON; returns the exit code."""
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        value = "not measured" if figure.value is None else f"{figure.value:,.4g} {figure.unit}".rstrip()
        goal = "" if figure.goal is None else f"goal: {'at least' if figure.at_least else 'at most'} {figure.goal:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
        sys.stdout.write(f"{figure.name:<{width}}  {value:>24}  {goal:<20} {verdict}".rstrip() + "\n")
    about = {
        "benchmark": name,
        "quick": options.quick,
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
    }
    sys.stdout.write(json.dumps(about) + "\n")
    if options.output:
        with atomic_write(str(options.output)) as file:
            file.write(json.dumps(about | machine(), indent=1).encode() + b"\n")
    return int(options.check and any(figure.met is False for figure in figures))


def machine() -> dict[str, object]:
    """Hardware, versions and command, for results that are kept."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()},
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
