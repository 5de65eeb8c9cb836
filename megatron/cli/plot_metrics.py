"""`tools/plot_metrics.py`: a picture of a run's losses, one curve per exit, from what --metrics-file wrote.

`read_metrics` gives the curves as arrays; `draw` makes a matplotlib figure of them without touching its global state.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.cli.guard import run_guarded
from megatron.errors import ConfigError, DataError, StorageError
from megatron.exits.spec import FINAL
from megatron.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X_KEYS = {"tokens": "consumed_tokens", "samples": "consumed_samples", "iterations": "iteration"}
TRAIN, HELD_OUT = "loss/", "eval/loss/"  # kinds of lines, by the names of what they hold
Rows = dict[tuple[int, str], dict[str, Any]]  # (iteration, kind) -> a line
SIZE = (10.0, 5.2)  # inches; at 110 dots per inch as wide as a README is shown
INK, FAINT = "#1f2933", "#c3cad3"
COLOURS = np.array([(0.90, 0.49, 0.13), (0.13, 0.60, 0.53), (0.11, 0.29, 0.62)])  # first exit ... final head


@dataclass(frozen=True)
class Head:
    """One head's curves: training loss at `x`, held-out loss at `eval_x`. `name` is `final` or `exit_<n>`."""

    name: str
    x: np.ndarray
    loss: np.ndarray
    eval_x: np.ndarray
    eval_loss: np.ndarray

    @property
    def title(self) -> str:
        """`exit 6`, or `full model`."""
        return "full model" if self.name == FINAL else self.name.replace("_", " ")

    @property
    def last(self) -> float:
        """The newest held-out loss; without one the smoothed training loss at the end."""
        return float(self.eval_loss[-1] if len(self.eval_loss) else smooth(self.loss)[-1])


def read_metrics(path: Path, x_axis: str = "tokens") -> list[Head]:
    """The heads in a metrics file, shallow first. Of an iteration that was repeated after a crash the last line counts.

    Raises DataError where the file is missing, is no metrics file, or holds no loss.
    """
    rows = _read_rows(path)
    key = X_KEYS[x_axis]
    position = {i: row[key] for (i, kind), row in rows.items() if kind == TRAIN and key in row}
    names = {k.removeprefix(kind) for (_, kind), row in rows.items() for k in row if kind and k.startswith(kind)}
    heads = []
    for name in sorted(names, key=_depth):
        train, held_out = (_curve(rows, kind, name, position) for kind in (TRAIN, HELD_OUT))
        if len(train[0]) or len(held_out[0]):
            heads.append(Head(name, *train, *held_out))
    if not heads:
        raise DataError(f"{path} holds no loss yet: train with --metrics-file {path} first")
    return heads


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Moving average over `share` of the curve around each point; towards the ends over what is there of it."""
    half = int(len(values) * share / 2)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw(heads: Sequence[Head], title: str, x_axis: str = "tokens", log_x: bool = False) -> "Figure":
    """Training and held-out losses over the run, each curve named at its end.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'ee-llm[plot]'") from error
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for head, colour in zip(heads, _colours(len(heads)), strict=True):
        axes.plot(head.x, head.loss, color=colour, alpha=0.13, linewidth=0.7)
        axes.plot(head.x, smooth(head.loss), color=colour, linewidth=1.8, label=head.title)
        axes.plot(head.eval_x, head.eval_loss, "o", color=colour, markersize=6, markeredgecolor="white", zorder=3)
    if log_x:
        axes.set_xscale("log")
    _frame(axes, heads, title, x_axis)
    _name_curves(axes, heads)
    _explain(axes, any(len(head.eval_x) for head in heads))
    return figure


def _read_rows(path: Path) -> Rows:
    rows: Rows = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--metrics-file {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            kind = next((kind for kind in (TRAIN, HELD_OUT) for name in dict(row) if name.startswith(kind)), "")
            rows[int(row["iteration"]), kind] = row
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                continue  # a run that is still writing
            raise DataError(f"--metrics-file {path}, line {number}: no line of a metrics file") from error
    return rows


def _curve(rows: Rows, kind: str, name: str, position: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and finite losses of a head, in the order of the iterations."""
    points = [
        (position.get(i, i), row[kind + name])
        for (i, found), row in sorted(rows.items())
        if found == kind and _is_number(row.get(kind + name))
    ]
    table = np.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _depth(name: str) -> float:
    """Sorting key: exits by layer, the final head last."""
    number = name.rpartition("_")[2]
    return float(number) if number.isdigit() else math.inf


def _colours(count: int) -> list[tuple[float, ...]]:
    shares = np.linspace(0, 1, count) if count > 1 else np.ones(1)
    anchors = np.linspace(0, 1, len(COLOURS))
    return [tuple(float(np.interp(share, anchors, channel)) for channel in COLOURS.T) for share in shares]


def _frame(axes: "Axes", heads: Sequence[Head], title: str, x_axis: str) -> None:
    """Limits, grid and titles. The fall of the first steps is cut off: it would press all curves into one line."""
    axes.set_title(title, loc="left", color=INK, fontsize=14, fontweight="bold", pad=14)
    axes.set_xlabel(f"{x_axis} trained on", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    curves = [smooth(head.loss) for head in heads if len(head.loss)] or [head.eval_loss for head in heads]
    low = min([float(curve.min()) for curve in curves] + [head.last for head in heads])
    high = max(float(curve[len(curve) // 20]) for curve in curves)
    margin = 0.06 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    """3000000 -> 3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _name_curves(axes: "Axes", heads: Sequence[Head]) -> None:
    """Write each head's name and last loss beside the end of its curve, moved apart where they would touch."""
    low, high = axes.get_ylim()
    distance = 0.055 * (high - low)
    colours = dict(zip([head.name for head in heads], _colours(len(heads)), strict=True))
    ordered = sorted(heads, key=lambda head: head.last)
    places: list[float] = []
    for head in ordered:
        places.append(max(head.last, places[-1] + distance) if places else head.last)
    for head, place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{head.title}  {head.last:.2f}",
            xy=(1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colours[head.name],
            fontweight="bold",
            fontsize=11,
            annotation_clip=False,
        )


def _explain(axes: "Axes", with_evaluation: bool) -> None:
    """A legend for the kinds of marks; which head is which is said at the curves themselves."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=INK, linewidth=1.8, label="training, smoothed")]
    if with_evaluation:
        marks.append(Line2D([], [], color=INK, marker="o", linestyle="", markersize=6, label="held-out text"))
    axes.legend(handles=marks, loc="upper right", frameon=False, labelcolor=INK)


def save(figure: "Figure", output: Path) -> None:
    """Write the picture in the format that its ending names. Raises ConfigError for an unknown one."""
    kind = output.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"--output {output}: give a name that ends in .png, .svg or .pdf")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(output)) as file:
            figure.savefig(file, format=kind, dpi=110)
    except OSError as error:
        raise StorageError(f"--output {output} cannot be written: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `tools/plot_metrics.py`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="plot_metrics.py",
        description="Draw the loss of every exit over a run, from what --metrics-file wrote.",
        allow_abbrev=False,
    )
    parser.add_argument("--metrics-file", required=True, type=Path, metavar="FILE", help="what the run wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture: .png, .svg or .pdf")
    parser.add_argument("--title", default="Loss of each exit", help="title of the picture")
    parser.add_argument("--x-axis", choices=tuple(X_KEYS), default="tokens", help="default: tokens")
    parser.add_argument("--log-x", action="store_true", help="logarithmic x axis")
    options = parser.parse_args(argv)

    def run() -> None:
        heads = read_metrics(options.metrics_file, options.x_axis)
        save(draw(heads, options.title, options.x_axis, options.log_x), options.output)
        sys.stdout.write(f"{options.output}\n")

    return run_guarded(run, "interrupted; nothing was written")
