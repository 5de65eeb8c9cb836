"""The config.json that a model of ours has among Hugging Face's architectures, where one of them can hold it."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.checkpoint.convert.hf_config import ARCHITECTURES
from megatron.config.model import ModelConfig
from megatron.errors import ConfigError


def architecture_of(model: ModelConfig, wanted: str | None = None) -> str:
    """The model_type that computes the same from the same tensors; `wanted`, where that is one.

    Raises ConfigError naming what no architecture has.
    """
    reasons = {kind: list(_obstacles(model, kind)) for kind in ARCHITECTURES}
    fitting = [kind for kind in ARCHITECTURES if not reasons[kind]]
    if fitting:
        return wanted if wanted in fitting else fitting[0]
    kind = min(ARCHITECTURES, key=lambda kind: len(reasons[kind]))
    raise ConfigError(
        f"no architecture of Hugging Face that is written ({', '.join(ARCHITECTURES)}) computes this model; "
        f"{kind} comes nearest, but: {', '.join(reasons[kind])}"
    )


def config_of(model: ModelConfig, kind: str, vocab_size: int, dtype: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an architecture that fits. `kept`: token ids and the like, taken over as they are."""
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return common | (_gpt2(model) if kind == "gpt2" else _llama(model, kind)) | dict(kept)


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "n_positions": model.max_positions,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
    }


def _llama(model: ModelConfig, kind: str) -> dict[str, Any]:
    config = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": model.max_positions,
        "hidden_act": "silu" if model.swiglu else "gelu_pytorch_tanh",
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": model.attention_dropout,
        "head_dim": model.head_dim,
        **_rotary(model),
    }
    if kind == "llama":
        config |= {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    if kind == "mistral":
        config |= {"sliding_window": model.window_size}
    if kind in ("qwen2", "qwen3"):
        layers = model.num_layers if model.window_size is None else 0  # from which on the window holds
        config |= {
            "use_sliding_window": model.window_size is not None,
            "sliding_window": model.window_size,
            "max_window_layers": layers,
        }
    if kind == "qwen3":
        config |= {"attention_bias": False}
    return config


def _rotary(model: ModelConfig) -> dict[str, Any]:
    """Spelled as releases before 5 read it, which later ones read, too."""
    scaling: dict[str, Any] | None = None
    if model.rotary_seq_len_interpolation_factor:
        scaling = {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
    if model.use_rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_position_embeddings,
        }
    return {"rope_theta": model.rotary_base, "rope_scaling": scaling}


def _obstacles(model: ModelConfig, kind: str) -> Iterator[str]:
    """What of the model an architecture doesn't have, by flag."""
    if model.apply_layernorm_1p:
        yield "--apply-layernorm-1p"
    if model.apply_residual_connection_post_layernorm:
        yield "--apply-residual-connection-post-layernorm"
    if model.use_rope_scaling and model.rotary_seq_len_interpolation_factor:
        yield "--use-rope-scaling and --rotary-seq-len-interpolation-factor at once"
    yield from _gpt2_obstacles(model) if kind == "gpt2" else _llama_obstacles(model, kind)


def _gpt2_obstacles(model: ModelConfig) -> Iterator[str]:
    wanted = {
        "--normalization": (model.normalization, "LayerNorm"),
        "--position-embedding-type": (model.position_embedding_type, "learned_absolute"),
        "linear biases": (model.add_bias_linear, True),
        "--num-query-groups": (model.num_kv_heads, model.num_attention_heads),
        "--kv-channels": (model.head_dim * model.num_attention_heads, model.hidden_size),
        "--qk-layernorm": (model.qk_layernorm, False),
        "--window-size": (model.window_size, None),
    }
    yield from (f"{what} {found}" for what, (found, needed) in wanted.items() if found != needed)
    if model.activation not in ("gelu", "gelu_tanh") or model.gated:
        yield f"an MLP with {model.activation}{' and a gate' if model.gated else ''}"


def _llama_obstacles(model: ModelConfig, kind: str) -> Iterator[str]:
    wanted = {
        "--normalization": (model.normalization, "RMSNorm"),
        "--position-embedding-type": (model.position_embedding_type, "rope"),
        "--rotary-percent": (model.rotary_percent, 1.0),
        "an MLP with a gate:": (model.gated, True),
        "biases in all linear layers:": (model.add_bias_linear, kind == "llama" and model.add_bias_linear),
        "biases of query, key and value alone:": (model.qkv_bias and not model.add_bias_linear, kind == "qwen2"),
        "--qk-layernorm": (model.qk_layernorm, kind == "qwen3"),
    }
    yield from (f"{what} {found}" for what, (found, needed) in wanted.items() if found != needed)
    if kind == "llama" and model.window_size is not None:
        yield f"--window-size {model.window_size}"
    if kind == "llama" and model.hidden_size % model.num_attention_heads:  # its class refuses such a config
        yield f"--num-attention-heads {model.num_attention_heads}, which does not divide --hidden-size"
