"""Random configs for property tests: any value of the right type, and configs that satisfy every rule."""

from hypothesis import strategies as st

from megatron.config.fields import Flag, all_flags, build
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.run import RunConfig
from megatron.config.training import LrConfig, TrainingConfig

# argparse takes a bare -- for the end of flags wherever it stands.
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).filter(lambda text: text != "--")
# A word of a list cannot look like a flag: nothing on a command line could tell them apart.
_WORD = _TEXT.filter(lambda word: word and not word.startswith("-"))
_FLOAT = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


def _one(flag: Flag) -> st.SearchStrategy:
    if flag.choices:
        return st.sampled_from(flag.choices)
    text = _WORD if flag.many else _TEXT
    return {bool: st.booleans(), int: st.integers(-9, 10**7), float: _FLOAT, str: text}[flag.kind]


def _value(flag: Flag) -> st.SearchStrategy:
    if flag.many:
        return st.lists(_one(flag), min_size=1, max_size=4).map(tuple)
    return _one(flag)


@st.composite
def any_config(draw: st.DrawFn) -> RunConfig:
    """A config of well-typed values that need not make sense together."""
    chosen = draw(st.lists(st.sampled_from(all_flags()), max_size=40, unique_by=lambda flag: flag.name))
    return build({flag.name: draw(_value(flag)) for flag in chosen}, RunConfig())


@st.composite
def valid_config(draw: st.DrawFn) -> RunConfig:
    """A config that satisfies every rule."""
    heads = draw(st.sampled_from((1, 2, 4, 8)))
    gqa = draw(st.booleans())
    seq_length = draw(st.integers(1, 4096))
    activation = draw(st.sampled_from(("swiglu", "geglu", "squared_relu", "openai_gelu", None)))
    model = ModelConfig(
        num_layers=draw(st.integers(1, 80)),
        num_attention_heads=heads,
        hidden_size=heads * draw(st.sampled_from((24, 32, 64))),
        seq_length=seq_length,
        max_position_embeddings=draw(st.none() | st.just(seq_length) | st.just(seq_length * 2)),
        group_query_attention=gqa,
        num_query_groups=draw(st.sampled_from([g for g in (1, 2, 4, 8) if heads % g == 0])) if gqa else 1,
        position_embedding_type=draw(st.sampled_from(("learned_absolute", "rope", "none"))),
        rotary_percent=draw(st.sampled_from((1.0, 0.5))),
        normalization=draw(st.sampled_from(("LayerNorm", "RMSNorm"))),
        norm_epsilon=draw(st.floats(1e-12, 1e-3)),
        attention_dropout=draw(st.floats(0, 0.9)),
        add_bias_linear=draw(st.booleans()),
        untie_embeddings_and_output_weights=draw(st.booleans()),
        **({activation: True} if activation else {}),
    )
    samples = draw(st.booleans())
    length = draw(st.integers(2, 10**6))
    micro = draw(st.integers(1, 8))
    unit = "samples" if samples else "iters"
    training = TrainingConfig(
        micro_batch_size=micro,
        global_batch_size=draw(st.none() | st.integers(1, 64).map(lambda n: n * micro)),
        seed=draw(st.integers(0, 2**31)),
        **{f"train_{unit}": length},
    )
    lr = draw(st.floats(1e-6, 1))
    rate = LrConfig(
        lr=lr,
        min_lr=draw(st.floats(0, lr)),
        lr_decay_style=draw(st.sampled_from(("constant", "linear", "cosine", "inverse-square-root"))),
        **{f"lr_warmup_{unit}": draw(st.integers(0, length - 1))},
    )
    return RunConfig(model=model, exits=draw(_exits(model.num_layers)), training=training, learning_rate=rate)


@st.composite
def _exits(draw: st.DrawFn, depth: int) -> ExitConfig:
    layers = tuple(draw(st.lists(st.integers(1, depth), unique=True, max_size=5)))
    if not layers:
        return ExitConfig(untie_exit_output_weights=draw(st.booleans()))
    numbers = st.just(()) | st.lists(st.floats(0.01, 9), min_size=len(layers), max_size=len(layers)).map(tuple)
    pre_exit = draw(st.booleans())
    return ExitConfig(
        exit_layer_nums=layers,
        pre_exit=pre_exit,
        use_exit_mlp=not pre_exit and draw(st.booleans()),
        use_exit_block=draw(st.booleans()),
        exit_norm=draw(st.sampled_from(("none", "own", "final"))),
        exit_layer_weight=draw(numbers),
        exit_layer_weight_init=draw(numbers),
        exit_layer_temperature=draw(numbers),
        exit_layer_weight_warmup_iters=draw(st.integers(0, 100)),
    )
