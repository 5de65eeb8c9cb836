"""Rules of the model and its exits: each function yields what is wrong with a config, naming flags and mend.

A rule is silent where a size that it needs is missing: only `sizes_given` complains about that.
"""

from collections.abc import Iterator

from megatron.config.model import ExitConfig
from megatron.config.run import RunConfig

Faults = Iterator[str]


def sizes_given(config: RunConfig) -> Faults:
    checkpoint = config.checkpoint
    unasked = checkpoint.load and not checkpoint.use_checkpoint_args
    mend = ", or take it from the checkpoint with --use-checkpoint-args" if unasked else ""
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if getattr(config.model, name) is None:
            yield f"--{name.replace('_', '-')} is missing: give it{mend}"


def heads_divide_hidden(config: RunConfig) -> Faults:
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if hidden and heads and heads > 0 and hidden % heads and config.model.kv_channels is None:
        yield (
            f"--num-attention-heads {heads} does not divide --hidden-size {hidden}: "
            "choose sizes that divide, or give --kv-channels"
        )


def groups_divide_heads(config: RunConfig) -> Faults:
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    if config.model.group_query_attention and heads and groups > 0 and heads % groups:
        yield f"--num-query-groups {groups} does not divide --num-attention-heads {heads}: choose a divisor"


def groups_need_gqa(config: RunConfig) -> Faults:
    if config.model.num_query_groups > 1 and not config.model.group_query_attention:
        yield f"--num-query-groups {config.model.num_query_groups} needs --group-query-attention: add it"


def rotary_share(config: RunConfig) -> Faults:
    if not 0 < config.model.rotary_percent <= 1:
        yield f"--rotary-percent must lie in (0, 1], got {config.model.rotary_percent:g}"


def rotary_channels(config: RunConfig) -> Faults:
    model = config.model
    if model.position_embedding_type != "rope" or not (model.hidden_size and model.num_attention_heads):
        return
    if any(rotary_share(config)):
        return
    channels = int(model.head_dim * model.rotary_percent)
    if channels % 2 or channels < 2:
        yield (
            f"--rotary-percent {model.rotary_percent:g} of {model.head_dim} channels per head rotates {channels}, "
            "and they turn in pairs: choose an even number (--rotary-percent, --kv-channels)"
        )


def rotary_scaling(config: RunConfig) -> Faults:
    model = config.model
    asked = [
        flag
        for flag, on in (
            ("--rotary-seq-len-interpolation-factor", model.rotary_seq_len_interpolation_factor is not None),
            ("--use-rope-scaling", model.use_rope_scaling),
        )
        if on
    ]
    if asked and model.position_embedding_type != "rope":
        yield f"{' and '.join(asked)} need(s) rotary positions: add --position-embedding-type rope"
    if len(asked) > 1:
        yield f"{' and '.join(asked)} are two ways to scale: give one of them"


def rope_frequencies(config: RunConfig) -> Faults:
    low, high = config.model.rope_low_freq_factor, config.model.rope_high_freq_factor
    if config.model.use_rope_scaling and not low < high:
        yield f"--rope-low-freq-factor {low:g} must be below --rope-high-freq-factor {high:g}"


def sequence_fits_positions(config: RunConfig) -> Faults:
    length, positions = config.model.seq_length, config.model.max_position_embeddings
    if length and positions and length > positions:
        yield (
            f"--seq-length {length} is longer than --max-position-embeddings {positions}: "
            "shorten the one or raise the other"
        )


def one_activation(config: RunConfig) -> Faults:
    kinds = ("swiglu", "geglu", "squared_relu", "openai_gelu")
    asked = [f"--{kind.replace('_', '-')}" for kind in kinds if getattr(config.model, kind)]
    if len(asked) > 1:
        yield f"{' and '.join(asked)} exclude each other: give one of them"


def gated_width(config: RunConfig) -> Faults:
    model = config.model
    if model.gated and model.hidden_size and model.hidden_size > 0 and model.ffn_size < 1:
        yield (
            f"--hidden-size {model.hidden_size} gives a gated MLP of width 0 (2/3 of 4 x hidden, rounded down "
            "to 64): give --ffn-hidden-size"
        )


def dropout_range(config: RunConfig) -> Faults:
    for name in ("attention_dropout", "hidden_dropout"):
        value = getattr(config.model, name)
        if not 0 <= value < 1:
            yield f"--{name.replace('_', '-')} must lie in [0, 1), got {value:g}"


def padded_vocabulary(config: RunConfig) -> Faults:
    padded, null = config.model.padded_vocab_size, config.tokenizer.vocab_size
    if padded and null and config.tokenizer.tokenizer_type == "NullTokenizer" and padded <= null:
        yield (
            f"--padded-vocab-size {padded} cannot hold --vocab-size {null} and the end-of-document token: "
            f"give at least {null + 1}"
        )


def exits_in_range(config: RunConfig) -> Faults:
    depth = config.model.num_layers
    for layer in config.exits.exit_layer_nums:
        if layer < 1:
            yield f"--exit-layer-nums {layer}: layers are counted from 1"
        elif depth and layer > depth:
            yield f"--exit-layer-nums {layer} lies beyond the model's depth: --num-layers is {depth}"


def exits_distinct(config: RunConfig) -> Faults:
    layers = config.exits.exit_layer_nums
    for layer in sorted({layer for layer in layers if layers.count(layer) > 1}):
        yield f"--exit-layer-nums names layer {layer} more than once: name it once"


def _one_to_one(exits: ExitConfig, name: str, what: str) -> Faults:
    given, count = len(getattr(exits, name)), len(exits.exit_layer_nums)
    if given and given != count:
        yield (
            f"--{name.replace('_', '-')} and --exit-layer-nums must correspond one to one: "
            f"{given} {what} for {count} exit(s)"
        )


def weights_match_exits(config: RunConfig) -> Faults:
    return _one_to_one(config.exits, "exit_layer_weight", "weight(s)")


def initial_weights_match_exits(config: RunConfig) -> Faults:
    return _one_to_one(config.exits, "exit_layer_weight_init", "initial weight(s)")


def temperatures_match_exits(config: RunConfig) -> Faults:
    return _one_to_one(config.exits, "exit_layer_temperature", "temperature(s)")


def mlp_excludes_pre_exit(config: RunConfig) -> Faults:
    if config.exits.use_exit_mlp and config.exits.pre_exit:
        yield "--use-exit-mlp and --pre-exit exclude each other: the MLP's branch leaves at the layer's output"


def parts_need_exits(config: RunConfig) -> Faults:
    exits = config.exits
    parts = ("use_exit_mlp", "use_exit_block", "pre_exit", "use_dynamic_exit_layer_weight")
    asked = [f"--{part.replace('_', '-')}" for part in parts if getattr(exits, part)]
    asked += [f"--exit-norm {exits.exit_norm}"] if exits.exit_norm != "none" else []
    if asked and not exits.exit_layer_nums:
        yield f"{', '.join(asked)}: there is no exit to apply to; give --exit-layer-nums"


def weights_not_negative(config: RunConfig) -> Faults:
    for name in ("exit_layer_weight", "exit_layer_weight_init"):
        for value in getattr(config.exits, name):
            if value < 0:
                yield f"--{name.replace('_', '-')} must not be negative, got {value:g}"


def temperatures_positive(config: RunConfig) -> Faults:
    for value in config.exits.exit_layer_temperature:
        if value <= 0:
            yield f"--exit-layer-temperature must be above 0, got {value:g}"


MODEL_RULES = (
    sizes_given,
    heads_divide_hidden,
    groups_divide_heads,
    groups_need_gqa,
    rotary_share,
    rotary_channels,
    rotary_scaling,
    rope_frequencies,
    sequence_fits_positions,
    one_activation,
    gated_width,
    dropout_range,
    padded_vocabulary,
    exits_in_range,
    exits_distinct,
    weights_match_exits,
    initial_weights_match_exits,
    temperatures_match_exits,
    mlp_excludes_pre_exit,
    parts_need_exits,
    weights_not_negative,
    temperatures_positive,
)
