"""Pictures of timelines, simulated or measured: text, SVG, and a matplotlib figure for PNG. No torch.

A row is a rank, a box an action with its microbatch's number; exit heads have a colour of their own, and microbatches
that don't run everywhere (fillers) a dashed edge. Several timelines share one time scale, and an axis at the bottom.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from megatron.errors import ConfigError
from megatron.schedule.actions import COMPUTES, Op, ScheduleError
from megatron.schedule.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panels = Sequence[tuple[str, Timeline]]  # a title and what happened

INK, GREY, FAINT, PAPER = "#1f2933", "#5b6673", "#f1f3f5", "#ffffff"
COLOURS = {  # fill, text; shades of one colour for what belongs together
    Op.FORWARD: ("#3b6fb6", "#ffffff"),
    Op.HEADS: ("#f0a03c", INK),
    Op.BACKWARD: ("#58a55c", "#ffffff"),
    Op.INPUT: ("#3f8f57", "#ffffff"),
    Op.WEIGHT: ("#a9d3a4", INK),
    Op.REDUCE: ("#8a63a8", "#ffffff"),
}
PARTIAL = "fills a bubble"
OTHER = ("#8b95a1", "#ffffff")  # messages, where they take time
NAMES = {
    Op.FORWARD: "forward",
    Op.HEADS: "exit heads",
    Op.BACKWARD: "backward",
    Op.INPUT: "backward, inputs",
    Op.WEIGHT: "backward, weights",
    Op.REDUCE: "gradient reduction",
}
WIDTH, LEFT, ROW, BAR, HEAD = 1000, 62, 30, 24, 34  # SVG units; ROW from bar to bar, HEAD above each panel
AXIS, FOOT = 26, 30  # heights of the time axis and of the legend
TICKS = 8  # at most, beside 0


@dataclass(frozen=True)
class Bar:
    """One box: which panel and row it is in, when, and how it looks."""

    panel: int
    rank: int
    start: float
    length: float
    fill: str
    ink: str
    label: str
    hint: str
    opacity: float  # paler for a rank's later stages
    partial: bool


def text_timeline(timeline: Timeline, unit: float = 1.0) -> str:
    """A row of text for each rank, a column for each `unit` of time: `F0` where an action starts, `--` as it goes on.

    For schedules whose times are multiples of `unit`; what takes no time is left out.
    """
    columns = round(timeline.makespan / unit)
    cells = [["." for _ in range(columns)] for _ in timeline.spans]
    for rank, spans in enumerate(timeline.spans):
        for action, start, end in spans:
            first, last = round(start / unit), round(end / unit)
            for column in range(first, last):
                cells[rank][column] = f"{action.op.value}{action.microbatch}" if column == first else "--"
    width = max((len(cell) for row in cells for cell in row), default=1) + 1
    name = len(str(len(cells) - 1))
    lines = [f"rank {rank:>{name}} " + "".join(f"{cell:<{width}}" for cell in row) for rank, row in enumerate(cells)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def svg(panels: Panels, unit: str = "", figures: Sequence[str] | None = None) -> str:
    """An SVG picture of the timelines, one below the other. unit: of the times, as `ms`.

    figures: what is said of each beside its title, where it is a part of something; by default time and idle share of
    what is drawn. Raises ScheduleError where there is nothing to draw.
    """
    scale = (WIDTH - LEFT - 12) / _longest(panels)
    tops = _tops(panels)
    height = tops[-1] + AXIS + FOOT
    names = "; ".join(title for title, _ in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label={quoteattr(names)}>',
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
    ]
    said = figures or [_figures(timeline, unit) for _, timeline in panels]
    for (title, timeline), words, top in zip(panels, said, tops[:-1], strict=True):
        parts.append(
            f'<text x="12" y="{top - 10}" font-size="14" fill="{INK}">{escape(title)}'
            f'<tspan font-size="12" fill="{GREY}" dx="10">{escape(words)}</tspan></text>'
        )
        for rank in range(len(timeline.spans)):
            y = top + rank * ROW
            parts.append(f'<text x="12" y="{y + 16}" font-size="12" fill="{INK}">rank {rank}</text>')
            length = timeline.makespan * scale
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.2f}" height="{BAR}" fill="{FAINT}"/>')
    parts += [_svg_bar(bar, tops[bar.panel] + bar.rank * ROW, scale) for bar in _bars(panels)]
    parts += _svg_axis(_ticks(_longest(panels)), scale, tops[-1], unit)
    parts += _svg_legend(panels, height - 12)
    return "\n".join([*parts, "</svg>", ""])


def figure(panels: Panels, unit: str = "", figures: Sequence[str] | None = None) -> "Figure":
    """The same as a matplotlib figure, to be saved as PNG.

    Raises ConfigError where matplotlib is not installed, ScheduleError where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'ee-llm[plot]'") from error
    longest = _longest(panels)
    rows = [len(timeline.spans) for _, timeline in panels]
    made = Figure(figsize=(WIDTH / 100, (_tops(panels)[-1] + AXIS + FOOT) / 70), layout="constrained", facecolor=PAPER)
    axes = made.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
    said = figures or [_figures(timeline, unit) for _, timeline in panels]
    for (title, timeline), words, each in zip(panels, said, axes, strict=True):
        _frame(each, f"{title}   {words}", len(timeline.spans), longest)
    axes[-1].tick_params(labelbottom=True, labelsize=8)
    axes[-1].set_xlabel(_axis_label(unit), fontsize=8, color=GREY)
    for bar in _bars(panels):
        _draw_bar(axes[bar.panel], bar, longest)
    handles = [axes[0].barh(0, 0, color=COLOURS[op][0], label=NAMES[op]) for op in _ops(panels)]
    if any(bar.partial for bar in _bars(panels)):
        handles.append(axes[0].barh(0, 0, color=PAPER, edgecolor=INK, linestyle="--", label=PARTIAL))
    made.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return made


def _bars(panels: Panels) -> Iterator[Bar]:
    """All boxes that take time."""
    for panel, (_, timeline) in enumerate(panels):
        partial, p = _partial(timeline), len(timeline.spans)
        chunks = 1 + max(span.action.stage for spans in timeline.spans for span in spans) // p
        for rank, spans in enumerate(timeline.spans):
            for action, start, end in spans:
                if end > start:
                    fill, ink = COLOURS.get(action.op, OTHER)
                    fades = action.op in COMPUTES and action.microbatch in partial
                    opacity = 1 - 0.4 * (action.stage // p) / max(1, chunks - 1)
                    hint = f"{action}: {start:g} to {end:g}"
                    yield Bar(panel, rank, start, end - start, fill, ink, str(action.microbatch), hint, opacity, fades)


def _partial(timeline: Timeline) -> frozenset[int]:
    """Microbatches that don't go forward on every stage and back."""
    actions = [span.action for spans in timeline.spans for span in spans]
    stages = 1 + max((action.stage for action in actions), default=-1)
    begun: dict[int, int] = {}
    for action in actions:
        if action.op in (Op.FORWARD, Op.DROP):
            begun[action.microbatch] = begun.get(action.microbatch, 0) + (1 if action.op is Op.FORWARD else -1)
    return frozenset(microbatch for microbatch, count in begun.items() if count < stages)


def _longest(panels: Panels) -> float:
    longest = max((timeline.makespan for _, timeline in panels), default=0.0)
    if longest <= 0:
        raise ScheduleError("there is nothing to draw: no action of the timeline takes any time")
    return longest


def _tops(panels: Panels) -> list[int]:
    """Where the rows of each panel begin, and where the last panel ends."""
    tops = [HEAD]
    for _, timeline in panels:
        tops.append(tops[-1] + len(timeline.spans) * ROW + HEAD)
    tops[-1] -= HEAD - 8
    return tops


def _figures(timeline: Timeline, unit: str) -> str:
    time = f"{timeline.makespan:.4g} {unit}".strip()
    return f"step {time}, {max(0.0, timeline.bubble_share):.1%} idle"


def _axis_label(unit: str) -> str:
    return f"time, {unit}" if unit else "time"


def _ticks(longest: float) -> list[float]:
    """From 0, in steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(longest / TICKS))
    step = next(times * power for times in (1, 2, 5, 10) if times * power * TICKS >= longest * (1 - 1e-9))
    return [number * step for number in range(int(longest / step * (1 + 1e-9)) + 1)]


def _ops(panels: Panels) -> list[Op]:
    """What the legend explains."""
    found = {span.action.op for _, timeline in panels for spans in timeline.spans for span in spans}
    return [op for op in NAMES if op in found]


def _svg_bar(bar: Bar, y: int, scale: float) -> str:
    x, width = LEFT + bar.start * scale, bar.length * scale
    dashes = f' stroke="{INK}" stroke-dasharray="3 2"' if bar.partial else f' stroke="{PAPER}"'
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" rx="2" fill="{bar.fill}" '
        f'fill-opacity="{bar.opacity:.2f}"{dashes}/>'
    )
    size = min(12.0, 1.6 * width / len(bar.label))
    label = ""
    if size >= 6:
        label = (
            f'<text x="{x + width / 2:.2f}" y="{y + BAR / 2 + size * 0.36:.2f}" font-size="{size:.1f}" '
            f'text-anchor="middle" fill="{bar.ink}">{bar.label}</text>'
        )
    return f"<g><title>{escape(bar.hint)}</title>{box}{label}</g>"


def _svg_axis(ticks: Sequence[float], scale: float, y: int, unit: str) -> list[str]:
    """A line with ticks and their times; their unit stands before it."""
    parts = [f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - 12}" y2="{y}" stroke="{GREY}"/>']
    if unit:
        parts.append(f'<text x="12" y="{y + 4}" font-size="11" fill="{GREY}">{escape(unit)}</text>')
    for tick in ticks:
        x = LEFT + tick * scale
        parts.append(f'<line x1="{x:.2f}" y1="{y}" x2="{x:.2f}" y2="{y + 5}" stroke="{GREY}"/>')
        parts.append(
            f'<text x="{x:.2f}" y="{y + 18}" font-size="11" text-anchor="middle" fill="{GREY}">{tick:.6g}</text>'
        )
    return parts


def _svg_legend(panels: Panels, y: int) -> list[str]:
    parts, x = [], LEFT
    for op in _ops(panels):
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{COLOURS[op][0]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}" font-size="12" fill="{INK}">{NAMES[op]}</text>')
        x += 36 + 7 * len(NAMES[op])
    if any(bar.partial for bar in _bars(panels)):
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{PAPER}" stroke="{INK}" '
            f'stroke-dasharray="3 2"/>'
        )
        parts.append(f'<text x="{x + 17}" y="{y}" font-size="12" fill="{INK}">{PARTIAL}</text>')
    return parts


def _frame(axes: "Axes", title: str, rows: int, longest: float) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlim(0, longest)
    axes.set_xticks(_ticks(longest))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(rows), [f"rank {rank}" for rank in range(rows)], fontsize=8)
    axes.tick_params(length=0, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def _draw_bar(axes: "Axes", bar: Bar, longest: float) -> None:
    from matplotlib.colors import to_rgba

    fill = to_rgba(bar.fill, bar.opacity)
    style = {"edgecolor": INK, "linestyle": "--"} if bar.partial else {"edgecolor": PAPER}
    axes.barh(bar.rank, bar.length, left=bar.start, height=0.8, color=fill, linewidth=0.7, **style)
    if bar.length / longest > 0.006 * len(bar.label):
        middle = bar.start + bar.length / 2
        axes.text(middle, bar.rank, bar.label, ha="center", va="center", fontsize=7, color=bar.ink)
