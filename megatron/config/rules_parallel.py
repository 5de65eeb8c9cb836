"""Rules of how a run is spread over ranks: what has to divide by what. Each names flags and mend."""

from collections.abc import Callable, Iterator

from megatron.config.run import RunConfig

Faults = Iterator[str]


def layers_divide(config: RunConfig) -> Faults:
    layers, pp = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    if layers and pp > 0 and layers % pp:
        yield f"--pipeline-model-parallel-size {pp} does not divide --num-layers {layers}: every stage has as many"


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
    heads_divide,
    vocabulary_divides,
    sequence_divides,
)
