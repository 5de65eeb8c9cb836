"""A Hugging Face config.json as data, and the model that it describes, in our terms.

Five architectures are known: Llama, Mistral, Qwen2, Qwen3 and GPT-2. What a config asks for and our layers don't have
is refused by name; an absent key has the value that the architecture's own class gives it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron.checkpoint.typed import count, mapping, number, sequence, text
from megatron.config.model import ModelConfig
from megatron.errors import CheckpointError
from megatron.files import read_small

CONFIG = "config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_BASE_MODELS = {"llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}
_LARGEST = 16 << 20  # bytes of a JSON file
_MOST = 1 << 24  # of any size in a config
_TRAINED_LENGTH = 4096  # --seq-length of an imported model, whose config says how far it reaches and no more
# What another function of the same tensors would come from, and the value that is none.
_UNSUPPORTED = {
    "quantization_config": (None, "quantised weights"),
    "num_local_experts": (None, "a mixture of experts"),
    "num_experts": (None, "a mixture of experts"),
    "add_cross_attention": (False, "cross-attention"),
    "scale_attn_by_inverse_layer_idx": (False, "attention scaled by layer"),
    "scale_attn_weights": (True, "attention without scaling"),
    "partial_rotary_factor": (1.0, "partial rotary positions"),
}


@dataclass(frozen=True)
class Fields:
    """Values of a JSON object, checked one by one; a key that is absent or null has its default."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: str, default: Any = None) -> Any:
        """Any value at all."""
        value = self.values.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 on; must be there without a default."""
        value = count(self._given(name, default), name, self.where)
        if not 1 <= value <= _MOST:
            self.refuse(f"{name} is {value}, not 1 to {_MOST}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A finite number; must be there without a default."""
        return float(number(self._given(name, default), name, self.where))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(f"{name} is {value!r:.80}, not true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        return text(self._given(name, default), name, self.where)

    def nested(self, name: str) -> "Fields":
        """An object inside; empty where there is none."""
        return Fields(mapping(self._given(name, {}), name, self.where), f"{self.where}, {name}")

    def refuse(self, what: str) -> NoReturn:
        """Raise CheckpointError, naming the file."""
        raise CheckpointError(f"{self.where}: {what}")

    def _given(self, name: str, default: Any) -> dict[str, Any]:
        value = self.get(name, default)
        return {} if value is None else {name: value}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a foreign file. Raises CheckpointError where there is none, NaN and infinity included."""
    try:
        content = json.loads(read_small(path, _LARGEST).decode("utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return content


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def model_type(config: Fields) -> str:
    """The architecture, one of `ARCHITECTURES`. Raises CheckpointError for any other, and for its other heads."""
    known = ", ".join(ARCHITECTURES)
    kind = config.text("model_type", "")
    if kind not in ARCHITECTURES:
        config.refuse(f"model_type {kind!r:.80} is none of those that are read: {known}")
    fitting = (ARCHITECTURES[kind], _BASE_MODELS.get(kind, "GPT2Model"))
    named = sequence({"architectures": config.get("architectures", fitting)}, "architectures", config.where)
    if named and not any(name in fitting for name in named):
        config.refuse(f"architectures is {named!r:.80}: only language models are read, as {fitting[0]}")
    return kind


def model_of(config: Fields) -> ModelConfig:
    """The model that a config.json describes.

    Raises CheckpointError naming the file and the key: a size is missing or odd, or a feature is not supported.
    """
    kind = model_type(config)
    for name, (harmless, what) in _UNSUPPORTED.items():
        if config.get(name, harmless) != harmless:
            config.refuse(f"{name} asks for {what}, which is not supported")
    return _gpt2(config) if kind == "gpt2" else _llama(config, kind)


def _gpt2(config: Fields) -> ModelConfig:
    activation = config.text("activation_function", "gelu_new")
    if activation not in (*TANH_GELUS, "gelu"):
        config.refuse(f"activation_function {activation!r:.80} is not supported: it must be gelu_new or gelu")
    positions, hidden = config.whole("n_positions", 1024), config.whole("n_embd", 768)
    return ModelConfig(
        num_layers=config.whole("n_layer", 12),
        hidden_size=hidden,
        num_attention_heads=config.whole("n_head", 12),
        ffn_hidden_size=config.whole("n_inner", 4 * hidden),
        seq_length=min(positions, _TRAINED_LENGTH),
        max_position_embeddings=positions,
        norm_epsilon=config.real("layer_norm_epsilon", 1e-5),
        bias_gelu_fusion=activation != "gelu",
        untie_embeddings_and_output_weights=not config.flag("tie_word_embeddings", True),
        attention_dropout=config.real("attn_pdrop", 0.1),
        hidden_dropout=config.real("resid_pdrop", 0.1),
        init_method_std=config.real("initializer_range", 0.02),
    )


def _llama(config: Fields, kind: str) -> ModelConfig:
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", *TANH_GELUS):
        config.refuse(f"hidden_act {activation!r:.80} is not supported: it must be silu or gelu_pytorch_tanh")
    heads, positions = config.whole("num_attention_heads"), config.whole("max_position_embeddings")
    groups = config.whole("num_key_value_heads", heads if kind == "llama" else None)
    own_head = kind == "qwen3" or config.get("head_dim") is not None
    return ModelConfig(
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=config.whole("hidden_size"),
        num_attention_heads=heads,
        ffn_hidden_size=config.whole("intermediate_size"),
        kv_channels=config.whole("head_dim", 128) if own_head else None,
        group_query_attention=groups != heads,
        num_query_groups=groups if groups != heads else 1,
        seq_length=min(positions, _TRAINED_LENGTH),
        max_position_embeddings=positions,
        position_embedding_type="rope",
        **_rotary(config),
        normalization="RMSNorm",
        norm_epsilon=config.real("rms_norm_eps", 1e-6),
        swiglu=activation == "silu",
        geglu=activation != "silu",
        add_bias_linear=_all_biases(config, kind),
        add_qkv_bias=kind == "qwen2",
        qk_layernorm=kind == "qwen3",
        window_size=_window(config, kind),
        untie_embeddings_and_output_weights=not config.flag("tie_word_embeddings", False),
        attention_dropout=config.real("attention_dropout", 0.0),
        hidden_dropout=0.0,
        init_method_std=config.real("initializer_range", 0.02),
    )


def _all_biases(config: Fields, kind: str) -> bool:
    """Whether every linear layer has a bias: only Llama can say so, and only by both flags."""
    attention, mlp = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    if attention and kind != "llama":
        config.refuse(f"attention_bias is true, which is supported for Llama (with mlp_bias), not for {kind}")
    if attention != mlp:
        config.refuse("attention_bias and mlp_bias differ: biases are supported in all linear layers, in none, or "
                      "(Qwen2) in query, key and value alone")  # fmt: skip
    return attention


def _rotary(config: Fields) -> dict[str, Any]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.nested(name)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        rope.refuse("partial_rotary_factor asks for partial rotary positions, which is not supported")
    values: dict[str, Any] = {"rotary_base": rope.real("rope_theta", config.real("rope_theta", 10000.0))}
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "linear":
        return values | {"rotary_seq_len_interpolation_factor": rope.real("factor")}
    if kind == "llama3":
        return values | {
            "use_rope_scaling": True,
            "rope_scaling_factor": rope.real("factor"),
            "rope_low_freq_factor": rope.real("low_freq_factor"),
            "rope_high_freq_factor": rope.real("high_freq_factor"),
            "rope_original_max_position_embeddings": rope.whole("original_max_position_embeddings"),
        }
    if kind != "default" or any(isinstance(value, Mapping) for value in rope.values.values()):
        rope.refuse(f"rope_type {kind!r:.80} is not supported: it must be default, linear or llama3, for all layers")
    return values


def _window(config: Fields, kind: str) -> int | None:
    """The sliding window, which all layers must share."""
    if kind == "llama":
        return None
    if kind == "mistral":
        stated = config.values.get("sliding_window", 4096)
        return None if stated is None else config.whole("sliding_window", 4096)
    if not config.flag("use_sliding_window", False) or config.values.get("sliding_window", 4096) is None:
        return None
    layers = config.whole("num_hidden_layers")
    first = count({"max_window_layers": config.get("max_window_layers", 28)}, "max_window_layers", config.where)
    stated = {"layer_types": config.get("layer_types", [])}
    kinds = set(map(str, sequence(stated, "layer_types", config.where)))
    if not kinds:
        kinds = {"sliding_attention" if i >= first else "full_attention" for i in (0, layers - 1)}
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        config.refuse("layers differ in attention (max_window_layers, layer_types): one window for all is supported")
    return config.whole("sliding_window", 4096)
