"""`tools/plan_pipeline.py`: the fastest layout of a model on so many devices, found without any of them."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.cli.guard import run_guarded
from megatron.cli.plan_inputs import add_device_flags, chosen_device, vocabulary_rows
from megatron.config.load import load
from megatron.errors import ConfigError, StorageError
from megatron.exits.spec import exit_specs
from megatron.files import atomic_write
from megatron.model.partition import partition
from megatron.planning import report, units
from megatron.planning.device import Device
from megatron.planning.estimate import Estimate, Setup, estimate, timeline_of
from megatron.planning.parameters import model_parameters
from megatron.planning.search import RECOMPUTE, SCHEDULES, Found, Space, describe, schedule_name, search
from megatron.schedule.draw import Panels, figure, svg

ENTRY = "plan_pipeline.py"
DRAWN = 3  # microbatches in a picture, for each pipeline rank


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `tools/plan_pipeline.py`; returns the exit code."""
    options, words = _parser().parse_known_args(argv)
    return run_guarded(lambda: _plan(options, words), "interrupted; nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=ENTRY,
        description="Find the fastest tensor, pipeline and data parallel sizes, schedule and division of layers for a "
        "model that fit the devices' memory. Give the flags of a training run as well: model, exits, batch, precision. "
        "Its parallel sizes are free; its micro-batch size is kept if given.",
        allow_abbrev=False,
    )
    parser.add_argument("--num-gpus", type=int, required=True, metavar="N", help="how many devices there are")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(Space().schedules), metavar="NAME",
                        help=f"of {', '.join(SCHEDULES)}; all but the last by default: filling bubbles changes what is "
                        "trained on")  # fmt: skip
    parser.add_argument("--tp", nargs="+", type=int, default=[], metavar="N", help="tensor-parallel sizes to look at")
    parser.add_argument("--pp", nargs="+", type=int, default=[], metavar="N", help="pipeline-parallel sizes to look at")
    parser.add_argument("--recompute", nargs="+", choices=tuple(RECOMPUTE), default=list(RECOMPUTE), metavar="KIND",
                        help=f"of {', '.join(RECOMPUTE)}")  # fmt: skip
    parser.add_argument("--best", type=int, default=5, metavar="N", help="how many layouts to show")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="the best one's timeline: .svg or .png")
    parser.add_argument("--output", type=Path, metavar="FILE", help="all numbers as JSON")
    add_device_flags(parser)
    return parser


def _plan(options: argparse.Namespace, words: list[str]) -> None:
    begin = time.monotonic()
    loaded = load(words, ENTRY)
    config = loaded.config
    if min([options.num_gpus, options.best, *options.tp, *options.pp]) < 1:
        raise ConfigError("--num-gpus, --best, --tp and --pp are 1 or more")
    base = Setup(
        config, options.num_gpus, vocabulary_rows(config), chosen_device(options, config.precision.params_dtype)
    )
    micro = (config.training.micro_batch_size,) if "micro_batch_size" in loaded.given else ()
    space = Space(tuple(options.schedules), tuple(options.tp), tuple(options.pp), micro, tuple(options.recompute))
    found = search(base, space, options.best)
    sys.stdout.write(_text(base, found, time.monotonic() - begin))
    if options.draw:
        draw(base, found.best[0], options.draw)
    if options.output:
        _write(options.output, json.dumps(_data(base, found), indent=1) + "\n")


def _text(base: Setup, found: Found, spent: float) -> str:
    model, exits, device = base.config.model, base.config.exits, base.device
    whole = partition((model.num_layers,), exit_specs(exits))
    parameters = units.count(model_parameters(model, exits, whole, base.rows))
    names = [str(place) for place in range(1, len(found.best) + 1)]
    shown, best = list(found.best), found.best[0]
    given = _as_given(base)
    if given is not None:
        names.append("given")
        shown.append(given)
    parts = [
        f"{parameters} parameters on {base.world_size} x {device.name} ({device.flops_per_s / 1e12:.4g} TFLOP/s in "
        f"layers, {units.memory(device.memory)}): {found.judged} layouts in {spent:.1f} s",
        report.choices(shown, names) + _verdict(given, device),
        "The fastest of each schedule and division of layers:",
        report.kinds(found.kinds, device),
        f"The first by pipeline rank, {report.memory_unit(best)} ({units.counted(best.microbatches, 'microbatch')} a "
        f"step; forward and backward {units.seconds(best.forward_backward)}, sums of gradients "
        f"{units.seconds(best.reduction)}, update {units.seconds(best.update)}):",
        report.ranks(best),
        "Its flags:\n" + " ".join(report.flags(best)),
    ]
    if schedule_name(best) == "interleaved":
        parts.append("On GPUs leave CUDA_DEVICE_MAX_CONNECTIONS=1 unset.")
    return "\n".join(parts) + "\n"


def _as_given(base: Setup) -> Estimate | None:
    """The layout of the given flags, for comparison; None where they make none on these devices."""
    try:
        return estimate(base)
    except ConfigError:
        return None


def _verdict(given: Estimate | None, device: Device) -> str:
    return "" if given is None or given.fits(device) else "(the given one does not fit)\n"


def draw(base: Setup, best: Estimate, output: Path) -> None:
    """A picture of the first microbatches of a step. Raises ConfigError for a name that ends otherwise."""
    setup = replace(base, config=best.config)
    count = min(best.microbatches, DRAWN * len(best.ranks))
    timeline, whole = timeline_of(setup, count), units.seconds(best.forward_backward)
    part, time = "", f"forward and backward {whole}"
    if count < best.microbatches:
        part = f", {count} of {units.counted(best.microbatches, 'microbatch')}"
        time = f"{units.seconds(timeline.makespan)} of {whole}"
    write_picture([(describe(best) + part, timeline)], output, "s", [f"{time}, {units.percent(best.idle)} idle in all"])


def write_picture(panels: Panels, output: Path, unit: str = "", figures: Sequence[str] | None = None) -> None:
    """Write timelines as .svg or .png; unit and figures as in `schedule.draw.svg`."""
    if output.suffix == ".svg":
        _write(output, svg(panels, unit, figures))
    elif output.suffix == ".png":
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(str(output)) as file:
                figure(panels, unit, figures).savefig(file, format="png", dpi=110)
        except OSError as error:
            raise StorageError(f"{output} cannot be written: {error}") from error
    else:
        raise ConfigError(f"{output}: give a name that ends in .svg or .png")


def _data(base: Setup, found: Found) -> dict:
    device = base.device
    return {
        "num_gpus": base.world_size,
        "device": {"name": device.name, "flops_per_s": device.flops_per_s, "memory": device.memory},
        "judged": found.judged,
        "kinds": [
            {"schedule": schedule, "division": division, **report.as_data(one, device)}
            for (schedule, division), one in found.kinds.items()
        ],
        "best": [report.as_data(one, device) for one in found.best],
    }


def _write(output: Path, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(output)) as file:
            file.write(text.encode())
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error}") from error
