"""Rules of how a run is spread over ranks: what has to divide by what. Each names flags and mend."""

from collections.abc import Callable, Iterator

from megatron.config.layout import stage_depths
from megatron.config.run import RunConfig
from megatron.errors import ConfigError

Faults = Iterator[str]


def layers_divide(config: RunConfig) -> Faults:
    depth = config.parallel.num_layers_per_virtual_pipeline_stage
    if not config.model.num_layers or config.parallel.pipeline_model_parallel_size < 1 or (depth or 1) < 1:
        return
    try:
        stage_depths(config.parallel, config.model.num_layers)
    except ConfigError as error:
        yield str(error)


def chunks_fit_the_schedule(config: RunConfig) -> Faults:
    parallel, several = config.parallel, _several_stages(config)
    if parallel.pipeline_schedule == "interleaved" and several is False:
        yield (
            "--pipeline-schedule interleaved needs several stages on each rank: give "
            "--num-layers-per-virtual-pipeline-stage, or a --pipeline-model-parallel-layout of more stages"
        )
    if several and parallel.pipeline_schedule in ("gpipe", "zb-h1"):
        yield (
            f"--pipeline-schedule {parallel.pipeline_schedule} has one stage a rank: leave out "
            "--num-layers-per-virtual-pipeline-stage, or choose interleaved"
        )


def _several_stages(config: RunConfig) -> bool | None:
    """Whether a rank has several stages; None where the layers don't spread at all."""
    layers, parallel = config.model.num_layers, config.parallel
    if not layers or parallel.pipeline_model_parallel_size < 1 or next(layers_divide(config), None):
        return None
    return len(stage_depths(parallel, layers)) > parallel.pipeline_model_parallel_size


def split_backward_is_eager(config: RunConfig) -> Faults:
    if config.parallel.pipeline_schedule == "zb-h1" and config.training.torch_compile:
        yield "--pipeline-schedule zb-h1 and --torch-compile exclude each other: compiled layers don't split backward"
    if config.parallel.pipeline_schedule == "zb-h1" and config.precision.fp8:
        yield "--pipeline-schedule zb-h1 and --fp8-format exclude each other: fp8 layers don't split backward"


def schedule_from_a_file(config: RunConfig) -> Faults:
    parallel = config.parallel
    if parallel.schedule_file is None:
        return
    if parallel.fill_explicit_bubbles or parallel.exit_placement != "before-backward":
        yield (
            "--schedule-file says where everything runs: leave out --fill-explicit-bubbles and --exit-placement planned"
        )
    if parallel.pipeline_schedule != "1f1b":
        yield f"--schedule-file and --pipeline-schedule {parallel.pipeline_schedule} exclude each other: give one"
    if config.training.rampup_batch_size:
        yield "--schedule-file has one number of microbatches: leave out --rampup-batch-size"
    if config.training.calculate_per_token_loss:
        yield "--schedule-file and --calculate-per-token-loss exclude each other: partial microbatches count as others"


def tuning(config: RunConfig) -> Faults:
    parallel = config.parallel
    if not parallel.tune_exit:
        if config.checkpoint.save_exits_only:
            yield "--save-exits-only would lose all else that is trained: it goes with --tune-exit"
        return
    stages, loaded = parallel.pipeline_model_parallel_size, parallel.tune_exit_pipeline_parallel_size
    if loaded > stages:
        yield (
            f"--tune-exit-pipeline-parallel-size {loaded} is more than the model's {stages} stages: lower it, or raise "
            f"--pipeline-model-parallel-size"
        )
    if not config.exits.exit_layer_nums and not config.checkpoint.use_checkpoint_args:
        yield "--tune-exit needs exits (--exit-layer-nums): nothing else learns"
    if _several_stages(config):
        yield ("--tune-exit takes one stage a rank: leave out --num-layers-per-virtual-pipeline-stage")
    if parallel.fill_explicit_bubbles:
        yield "--tune-exit and --fill-explicit-bubbles exclude each other: forward passes leave no bubbles to fill"


def filling(config: RunConfig) -> Faults:
    parallel = config.parallel
    if not parallel.fill_explicit_bubbles:
        return
    if parallel.pipeline_model_parallel_size == 1:
        yield "--fill-explicit-bubbles needs --pipeline-model-parallel-size above 1: one stage has no bubbles"
    if parallel.pipeline_schedule != "1f1b" or _several_stages(config):
        yield "--fill-explicit-bubbles fills the bubbles of --pipeline-schedule 1f1b without virtual stages"
    if config.training.calculate_per_token_loss:
        yield "--fill-explicit-bubbles and --calculate-per-token-loss exclude each other: fillers count as microbatches"
    if not config.exits.exit_layer_nums:
        yield "--fill-explicit-bubbles needs exits (--exit-layer-nums): partial microbatches train nothing else"


def heads_divide(config: RunConfig) -> Faults:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    sizes = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.num_query_groups if model.group_query_attention else None,
        "the MLP's width (--ffn-hidden-size)": model.ffn_size if model.hidden_size else None,
    }
    for name, size in sizes.items():
        if size and tp > 0 and size % tp:
            yield f"--tensor-model-parallel-size {tp} does not divide {name} {size}: each rank takes an equal share"


def vocabulary_divides(config: RunConfig) -> Faults:
    rows, tp = config.model.padded_vocab_size, config.parallel.tensor_model_parallel_size
    if rows and tp > 0 and rows % tp:
        yield f"--tensor-model-parallel-size {tp} does not divide --padded-vocab-size {rows}: pad it to a multiple"


def sequence_divides(config: RunConfig) -> Faults:
    length, parallel = config.model.seq_length, config.parallel
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length and tp > 0 and length % tp:
        yield f"--sequence-parallel: --tensor-model-parallel-size {tp} does not divide --seq-length {length}"


PARALLEL_RULES: tuple[Callable[[RunConfig], Faults], ...] = (
    layers_divide,
    chunks_fit_the_schedule,
    split_backward_is_eager,
    schedule_from_a_file,
    tuning,
    filling,
    heads_divide,
    vocabulary_divides,
    sequence_divides,
)
