"""`tools/draw_schedule.py`: timelines of pipeline schedules with exits, as text or as a picture."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.cli.guard import run_guarded
from megatron.cli.plan_pipeline import write_picture
from megatron.errors import ConfigError
from megatron.schedule.actions import Pipeline
from megatron.schedule.draw import text_timeline
from megatron.schedule.generate import GENERATORS
from megatron.schedule.place import best_fill, place_heads
from megatron.schedule.simulate import Costs, Timeline, simulate

NAMES = {
    "plain": "1F1B without early exits",
    "1f1b": "1F1B, heads before each backward",
    "planned": "1F1B, heads in idle time",
    "unfilled": "1F1B, the full microbatches of the filled step alone",
    "fill": "1F1B, bubbles filled",
    "gpipe": "GPipe",
    "interleaved": "Interleaved",
    "zb-h1": "Zero bubble (ZB-H1)",
}

UNIT = "forwards"  # of time: what a forward of one stage takes


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `tools/draw_schedule.py`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="draw_schedule.py",
        description="Draw what each pipeline rank does when, for equal stages and exits between them.",
        allow_abbrev=False,
    )
    parser.add_argument("--schedules", nargs="+", choices=tuple(NAMES), default=["1f1b"], metavar="NAME",
                        help=f"of {', '.join(NAMES)}; one below the other (default: 1f1b)")  # fmt: skip
    parser.add_argument("--stages", type=int, default=4, metavar="N", help="pipeline ranks (default: 4)")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N", help="of a step (default: 8)")
    parser.add_argument("--exits", nargs="*", type=int, default=[], metavar="STAGE",
                        help="the stage of each exit, from 0; the same again for a second one there")  # fmt: skip
    parser.add_argument("--backward", type=float, default=2.0, metavar="X", help="its time; a forward takes 1")
    parser.add_argument("--head", type=float, default=0.5, metavar="X", help="time of an exit's or the final head")
    parser.add_argument("--chunks", type=int, default=2, metavar="N", help="stages of a rank, interleaved (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FILE", help=".svg or .png; without it text is printed")
    options = parser.parse_args(argv)
    return run_guarded(lambda: _draw(options), "interrupted; nothing was written")


def _draw(options: argparse.Namespace) -> None:
    if min(options.stages, options.microbatches, options.chunks) < 1 or options.backward <= 0 or options.head < 0:
        raise ConfigError("--stages, --microbatches and --chunks are 1 or more, times are not negative")
    if any(not 0 <= stage < options.stages for stage in options.exits):
        raise ConfigError(f"--exits: the stages are 0 to {options.stages - 1}")
    panels = [_panel(name, options) for name in options.schedules]
    if options.output:
        write_picture(panels, options.output, UNIT)
        return
    for title, timeline in panels:
        figures = f"step {timeline.makespan:.4g}, {timeline.bubble_share:.1%} idle"
        sys.stdout.write(f"{title}: {figures}\n{text_timeline(timeline, 0.5)}\n")


def _panel(name: str, options: argparse.Namespace) -> tuple[str, Timeline]:
    """A schedule's title and what happens; the title of a filled step has the numbers of its microbatches."""
    chunks = options.chunks if name == "interleaved" else 1
    exits = [] if name == "plain" else [stage * chunks for stage in options.exits]
    stages = options.stages * chunks
    heads = [exits.count(stage) + (stage == stages - 1) for stage in range(stages)]
    half = options.backward / 2 / chunks
    costs = [Costs(1 / chunks, options.head * count, half, half) for count in heads]
    with_heads = frozenset(stage for stage, count in enumerate(heads) if count)
    pipeline = Pipeline(options.stages, options.microbatches, with_heads, chunks)
    if name in ("unfilled", "fill"):
        return _filled(name, pipeline, costs)
    schedule = GENERATORS.get(name, GENERATORS["1f1b"])(pipeline)
    return NAMES[name], simulate(place_heads(schedule, costs) if name == "planned" else schedule, costs)


def _filled(name: str, pipeline: Pipeline, costs: Sequence[Costs]) -> tuple[str, Timeline]:
    """The step with fillers, or that of its full microbatches alone, with which it is to be compared."""
    filling = best_fill(pipeline, costs)
    partial = filling.warmup + filling.cooldown
    full = f"{NAMES[name]}: {pipeline.num_microbatches - partial} full"
    return (full, filling.plain) if name == "unfilled" else (f"{full}, {partial} partial", filling.timeline)
