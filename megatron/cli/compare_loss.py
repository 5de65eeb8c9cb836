"""Compares two metrics files step by step: `tools/compare_loss.py A B [--assert-equal]`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.cli.guard import run_guarded
from megatron.errors import DataError, EELLMError


class Unequal(EELLMError):
    """The two runs differ."""


def read_losses(path: Path) -> dict[int, dict[str, float | None]]:
    """Iteration -> its losses and gradient norm; of repeated iterations the last counts (metrics-file contract)."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    rows: dict[int, dict[str, float | None]] = {}
    for number, line in enumerate(lines, 1):
        iteration, losses = _record(line, f"{path}, line {number}")
        if losses:
            rows[iteration] = losses
    return rows


def _record(line: bytes, where: str) -> tuple[int, dict[str, float | None]]:
    """One line's iteration with its losses and gradient norm; DataError names `where` it is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        raise DataError(f"{where}: not a record with an iteration")
    losses = {key: value for key, value in record.items() if key.startswith("loss/") or key == "grad_norm"}
    for key, value in losses.items():
        if not isinstance(value, int | float | None):
            raise DataError(f"{where}: {key} is {value!r}, not a number")
    return record["iteration"], losses


def compare(a: Path, b: Path) -> tuple[int, list[str]]:
    """Number of steps that both files have, and one line per difference."""
    left, right = read_losses(a), read_losses(b)
    differences = [f"iteration {i}: only in {a}" for i in left.keys() - right.keys()]
    differences += [f"iteration {i}: only in {b}" for i in right.keys() - left.keys()]
    common = sorted(left.keys() & right.keys())
    for i in common:
        for key in sorted(left[i].keys() | right[i].keys()):
            x, y = left[i].get(key), right[i].get(key)
            if x != y:
                differences.append(f"iteration {i}, {key}: {_hex(x)} against {_hex(y)}")
    return len(common), differences


def _hex(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g} ({float(value).hex()})"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `tools/compare_loss.py`; returns the exit code (1 with --assert-equal and a difference)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("a", type=Path, help="metrics file of one run")
    parser.add_argument("b", type=Path, help="metrics file of the other")
    parser.add_argument("--assert-equal", action="store_true", help="exit with 1 unless every loss is the same number")
    options = parser.parse_args(argv)
    return run_guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    steps, differences = compare(options.a, options.b)
    for line in differences[:20]:
        sys.stdout.write(line + "\n")
    if len(differences) > 20:
        sys.stdout.write(f"... and {len(differences) - 20} more\n")
    sys.stdout.write(f"{steps} common steps, {len(differences)} differences\n")
    if options.assert_equal and (differences or not steps):
        raise Unequal(f"{options.a} and {options.b} are not the same run")
