"""The `args` of a file in Megatron's format: what says there which model it holds, and what the format can't say."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from megatron.config.fields import all_flags, value_of
from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.tokenizer.base import padded_vocab_size

# Sections of ours whose fields are called there as they are here.
_SECTIONS = ("model", "exits", "tokenizer", "data", "training", "optimizer", "learning_rate", "precision")
_OURS_ALONE = ("exit_norm", "vocab_extra_ids", "geglu", "window_size", "qk_layernorm", "add_qkv_bias")
_EXITS = (
    *("exit_layer_nums", "pre_exit", "untie_exit_output_weights", "use_exit_mlp", "use_exit_block"),
    *("exit_layer_weight", "exit_layer_weight_init", "exit_layer_temperature"),
)
_UNSAYABLE = "model_type", "rank", "local_rank"  # an enumeration of the original's code; what each process had


def check_holdable(config: RunConfig) -> None:
    """Raises ConfigError naming all that Megatron's legacy format has no place for."""
    if missing := list(_no_place(config)):
        raise ConfigError(f"Megatron's legacy format can't hold this model: it has no {'; no '.join(missing)}")


def _no_place(config: RunConfig) -> Iterator[str]:
    model, exits = config.model, config.exits
    if model.add_qkv_bias and not model.add_bias_linear:
        yield "bias of the QKV projection alone (--add-qkv-bias)"
    if model.qk_layernorm:
        yield "norm of queries and keys (--qk-layernorm)"
    if model.window_size is not None:
        yield f"sliding window (--window-size {model.window_size})"
    if model.use_rope_scaling:
        yield "Llama-3 rotary scaling (--use-rope-scaling)"
    if model.geglu:
        yield "gated MLP with GELU (--geglu)"
    if exits.exit_layer_nums and exits.exit_norm == "final":
        yield "exits that share the final norm (--exit-norm final): give --to native, or exits with their own"


def check_divisible(config: RunConfig, tp: int, pp: int) -> None:
    """Raises ConfigError where tp or pp ranks can't share the model evenly, as the format has it."""
    model = config.model
    counts = {"--num-attention-heads": model.num_attention_heads, "--ffn-hidden-size": model.ffn_size}
    if model.group_query_attention:
        counts["--num-query-groups"] = model.num_query_groups
    bad = [f"tp={tp} does not divide {name} {value}" for name, value in counts.items() if value % tp]
    bad += [f"pp={pp} does not divide --num-layers {model.num_layers}"] if model.num_layers % pp else []
    if bad:
        raise ConfigError(f"the target's layout: {'; '.join(bad)}. Give other target sizes")


def padded_rows(config: RunConfig, vocab_size: int, tp: int) -> int:
    """Rows of the target's vocabularies: as the config fixes them where tp ranks can share these, else by the rule."""
    model = config.model
    fixed = model.padded_vocab_size
    if fixed is not None and fixed >= vocab_size and fixed % tp == 0:
        return fixed
    return padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, tp)


def namespace(
    config: RunConfig, stored: dict[str, Any], facts: dict[str, Any], dtype: torch.dtype, tp: int, pp: int, rows: int
) -> argparse.Namespace:
    """What a file's `args` are.

    stored: those of the source where it was of this format: what they say beyond the model stays. dtype: of the
    weights. rows: of vocabularies.
    """
    ours = {
        flag.name: _plain(value_of(config, flag))
        for flag in all_flags()
        if flag.section in _SECTIONS and flag.name not in _OURS_ALONE
    }
    # a file's own words stay for what a conversion doesn't change
    ours = {name: ours[name] for name in _EXITS} if stored else ours | _derived(config)
    kept = {name: _typed(name, value) for name, value in stored.items() if name not in _UNSAYABLE}
    layout = {
        "use_exit_norm": config.exits.exit_norm == "own",
        "params_dtype": dtype,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "transformer_pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "world_size": tp * pp,
        "data_parallel_size": 1,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": _divisor(config, rows, tp),
        "consumed_train_samples": facts.get("consumed_samples", 0),
        "consumed_valid_samples": facts.get("consumed_valid_samples", 0),
        "tune_exit": False,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return argparse.Namespace(**kept | ours | layout)


def _derived(config: RunConfig) -> dict[str, Any]:
    """What the original fills in when it parses flags."""
    model, precision = config.model, config.precision
    return {
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "num_query_groups": model.num_kv_heads if model.group_query_attention else 1,
        "use_rotary_position_embeddings": model.position_embedding_type == "rope",
        "add_position_embedding": model.position_embedding_type == "learned_absolute",
        "encoder_num_layers": model.num_layers,
        "encoder_seq_length": model.seq_length,
        "fp16": precision.fp16,
        "bf16": precision.bf16,
        "tune_exit_pipeline_parallel_size": 1,
        "transformer_impl": "local",
        "data_parallel_random_init": False,
    }


def _divisor(config: RunConfig, rows: int, tp: int) -> int:
    """--make-vocab-size-divisible-by with which tp ranks arrive at so many rows."""
    given = config.model.make_vocab_size_divisible_by
    before = config.parallel.tensor_model_parallel_size
    if tp == before or config.model.padded_vocab_size is None:
        return given
    larger = given * before
    return larger if rows % (larger * tp) == 0 else max(1, larger // tp)


def _typed(name: str, value: Any) -> Any:
    """An argument as the original had it: facts name number formats by text."""
    dtype = getattr(torch, value, None) if name.endswith("_dtype") and isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
