"""`--dry-run`: what a training command would take, said without data, devices or a process more. Nothing is written."""

import sys

import torch

from megatron.cli.plan_inputs import vocabulary_rows
from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.model.gpt import GPT
from megatron.model.partition import stages_of
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import launched_size
from megatron.parallel.tensor import TensorParallel
from megatron.planning import report, units
from megatron.planning.device import Device, named_like, preset
from megatron.planning.estimate import Estimate, Setup, estimate
from megatron.planning.parameters import model_parameters
from megatron.planning.search import RECOMPUTE, describe, nearest_recompute
from megatron.train.tuning import untie_heads

USUAL = "A100-80GB"  # where no GPU is found


def dry_run(config: RunConfig) -> None:
    """Build every pipeline rank's model without memory, predict memory and time, and print both.

    For as many processes as torchrun launched or WORLD_SIZE says, else one data-parallel rank. Raises ConfigError where
    it doesn't fit the device, with the recompute by which it would.
    """
    config = untie_heads(config)
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_ranks
    device = _device(config)
    setup = Setup(config, launched_size() or tp * pp, vocabulary_rows(config, tp), device or _usual(config))
    found = estimate(setup)
    build_without_memory(setup, found)
    sys.stdout.write(_text(setup, found, device is None))
    sys.stdout.flush()
    if not found.fits(setup.device):
        raise ConfigError(_misfit(setup, found))


def build_without_memory(setup: Setup, found: Estimate) -> None:
    """Every pipeline rank's modules on the meta device; their parameters are those that were counted."""
    config = setup.config
    tp = TensorParallel(config.parallel.tensor_model_parallel_size, sequence=config.parallel.sequence_parallel)
    for rank in found.ranks:
        with torch.device("meta"):
            model = GPT(config.model, config.exits, rank.stages, setup.rows, config.training, tp)
        assert sum(parameter.numel() for parameter in model.parameters()) == rank.parameters.total


def _device(config: RunConfig) -> Device | None:
    """As given, else the GPU that is there, if the presets know it."""
    dtype = config.precision.params_dtype
    if config.logging.device is not None:
        return preset(config.logging.device, dtype)
    backend = Backend.choose(config.parallel.distributed_backend)
    memory = backend.memory_bytes()
    return named_like(backend.name(), memory, dtype) if memory else None


def _usual(config: RunConfig) -> Device:
    return preset(USUAL, config.precision.params_dtype)


def _text(setup: Setup, found: Estimate, assumed: bool) -> str:
    config, device = setup.config, setup.device
    stages = stages_of(config.model, config.exits, config.parallel)
    parameters = units.count(model_parameters(config.model, config.exits, stages, setup.rows))
    name = f"{device.name} (assumed: give --device)" if assumed else device.name
    return "\n".join([
        f"{parameters} parameters on {setup.world_size} x {name}: {describe(found)}, "
        f"{units.counted(found.microbatches, 'microbatch')}, {found.tokens:,} tokens a step",
        report.ranks(found),
        f"step: {units.seconds(found.step)} (forward and backward {units.seconds(found.forward_backward)}, sums of "
        f"gradients {units.seconds(found.reduction)}, update {units.seconds(found.update)}), "
        f"{found.tokens_per_second:,.0f} tokens/s" + (" of full microbatches" if found.fillers else ""),
        f"memory: {units.memory(found.memory)} of {units.memory(device.memory)} that a run may use, "
        f"{report.memory_unit(found)} in the table; predicted, not measured",
        "it fits" if found.fits(device) else "it does not fit",
    ]) + "\n"  # fmt: skip


def _misfit(setup: Setup, found: Estimate) -> str:
    over = units.memory(found.memory - setup.device.memory)
    name = nearest_recompute(setup)
    if name is None:
        mend = "no recompute is enough: take more devices or a smaller --micro-batch-size (tools/plan_pipeline.py)"
    else:
        flags = {key: value for key, value in RECOMPUTE[name].items() if value != 1}
        words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items())
        mend = f"it would with {words}" if words else "it would without recompute"
    return f"the run takes {over} more than {setup.device.name} has: {mend}"
