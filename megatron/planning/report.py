"""Estimates in words, tables and plain data. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron.config.flags import to_argv
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.training import TrainingConfig
from megatron.planning.device import Device
from megatron.planning.estimate import Estimate, RankEstimate
from megatron.planning.search import describe, schedule_name
from megatron.planning.units import count, in_unit, memory, percent, seconds, unit_of

MANY = 8  # ranks of which a line tells the memory one by one


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, all but the last aligned to the right; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines) + "\n"


def choices(estimates: Sequence[Estimate], names: Sequence[str]) -> str:
    """One line for each layout."""
    rows = [("", "step", "tokens/s", "idle", "memory", "layout")]
    unit = unit_of([one.memory for one in estimates])
    for name, one in zip(names, estimates, strict=True):
        placed = ", heads in idle time" if one.config.parallel.exit_placement == "planned" else ""
        rows.append((name, seconds(one.step), f"{one.tokens_per_second:,.0f}", percent(one.idle),
                     memory(one.memory, unit), describe(one) + placed + _division(one)))  # fmt: skip
    return table(rows)


def kinds(found: Mapping[tuple[str, str], Estimate], device: Device) -> str:
    """One line for the fastest of each schedule and division of layers, the fastest first."""
    unit = unit_of([one.memory for one in found.values()])
    rows = [("schedule", "layers", "step", "tokens/s", "idle", f"memory by stage, {unit}", "layout")]
    for (schedule, division), one in sorted(found.items(), key=lambda item: -item[1].tokens_per_second):
        misfit = "" if one.fits(device) else " (does not fit)"
        rows.append((schedule, division, seconds(one.step), f"{one.tokens_per_second:,.0f}", percent(one.idle),
                     _by_stage(one, unit), describe(one) + misfit))  # fmt: skip
    return table(rows)


def _by_stage(estimate: Estimate, unit: str) -> str:
    """Memory of each pipeline rank; of many the first, the fullest and the last."""
    sizes = [rank.memory for rank in estimate.ranks]
    if len(sizes) > MANY:
        first, fullest, last = (in_unit(size, unit) for size in (sizes[0], max(sizes), sizes[-1]))
        return f"{first} .. at most {fullest} .. {last}"
    return " ".join(in_unit(size, unit) for size in sizes)


def _division(estimate: Estimate) -> str:
    depths = estimate.config.parallel.pipeline_model_parallel_layout
    return f", {depths}" if depths else ""


def memory_unit(estimate: Estimate) -> str:
    """In which `ranks` gives memory: GB, or MB where all is below 1 GB."""
    return unit_of([rank.memory for rank in estimate.ranks])


def ranks(estimate: Estimate) -> str:
    """One line for each pipeline rank: what it has, and its memory in `memory_unit`."""
    head = (
        "rank",
        "parameters",
        "weights, gradients",
        "optimizer",
        "activations",
        "heads' peak",
        "total",
        "idle",
        "has",
    )
    rows, unit = [head], memory_unit(estimate)
    for number, rank in enumerate(estimate.ranks):
        state = rank.state
        rows.append((
            str(number), count(rank.parameters.total), *(in_unit(size, unit) for size in (
                state.weights + state.gradients, state.optimizer, rank.activations, rank.heads_peak, rank.memory)),
            percent(rank.idle), contents(rank),
        ))  # fmt: skip
    return table(rows)


def contents(rank: RankEstimate) -> str:
    """Layers (from 1) and exits of a rank."""
    spans = ", ".join(_span(stage.first + 1, stage.last) for stage in rank.stages)
    exits = [spec.label for stage in rank.stages for spec in stage.exits]
    many = any(stage.last - stage.first > 1 for stage in rank.stages) or len(rank.stages) > 1
    return f"layer{'s' if many else ''} {spans}" + (f"; exit {', '.join(exits)}" if exits else "")


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def flags(estimate: Estimate) -> list[str]:
    """The flags that make the layout, to be given to the training program with the model's."""
    parallel, training = estimate.config.parallel, estimate.config.training
    fill = {name: getattr(parallel, name) for name in (
        "fill_explicit_bubbles", "num_fill_warmup_microbatches", "num_fill_cooldown_microbatches",
        "backward_forward_ratio")} if parallel.fill_explicit_bubbles else {}  # fmt: skip
    chosen = RunConfig(
        parallel=ParallelConfig(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            sequence_parallel=parallel.sequence_parallel,
            pipeline_schedule=parallel.pipeline_schedule,
            exit_placement=parallel.exit_placement,
            num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_pipeline_stage,
            pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
            **fill,
        ),
        training=TrainingConfig(
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            recompute_granularity=training.recompute_granularity,
            recompute_method=training.recompute_method,
            recompute_num_layers=training.recompute_num_layers,
        ),
    )
    return to_argv(chosen)


def as_data(estimate: Estimate, device: Device) -> dict[str, Any]:
    """All numbers of an estimate, for JSON. Times in seconds, memory in bytes, layers from 1."""
    parallel, training = estimate.config.parallel, estimate.config.training
    return {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "dp": estimate.dp,
        "schedule": schedule_name(estimate),
        "exit_placement": parallel.exit_placement,
        "micro_batch_size": training.micro_batch_size,
        "microbatches": estimate.microbatches,
        "fillers": estimate.fillers,
        "recompute": training.recompute_granularity or "none",
        "step": estimate.step,
        "tokens_per_second": estimate.tokens_per_second,
        "forward_backward": estimate.forward_backward,
        "reduction": estimate.reduction,
        "update": estimate.update,
        "idle": estimate.idle,
        "memory": estimate.memory,
        "fits": estimate.fits(device),
        "flags": flags(estimate),
        "ranks": [
            {
                "stages": [
                    {"first": s.first + 1, "last": s.last, "exits": [e.label for e in s.exits]} for s in one.stages
                ],
                "parameters": one.parameters.total,
                **asdict(one.state),
                "activations": one.activations,
                "heads_peak": one.heads_peak,
                "memory": one.memory,
                "idle": one.idle,
            }
            for one in estimate.ranks
        ],
    }
