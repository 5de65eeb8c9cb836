"""Configs at rest: JSON or YAML beside a checkpoint, and what a checkpoint says about the model it holds.

A checkpoint's config is ours (nested by section) or the arguments of a Megatron checkpoint as a flat mapping.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron.config.fields import all_flags, build, by_name, from_plain, spellings, value_of
from megatron.config.flags import unknown
from megatron.config.problems import raise_if_any
from megatron.config.rules import check
from megatron.config.run import RunConfig
from megatron.errors import StorageError
from megatron.files import atomic_write
from megatron.logs import get_logger

_logger = get_logger(__name__)

# With --use-checkpoint-args the checkpoint decides these: other values would make another function of its weights.
FORCED = (
    *("num_query_groups", "group_query_attention", "position_embedding_type", "rotary_percent"),
    *("add_bias_linear", "add_qkv_bias", "qk_layernorm", "swiglu", "geglu", "squared_relu", "openai_gelu"),
    *("untie_embeddings_and_output_weights", "apply_layernorm_1p", "normalization"),
    *("apply_residual_connection_post_layernorm", "make_vocab_size_divisible_by"),
    *("exit_layer_nums", "exit_layer_weight", "use_exit_mlp", "use_exit_block", "exit_norm"),
    *("untie_exit_output_weights", "pre_exit"),
)
# These it decides only where the command line is silent.
FILLED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "kv_channels"),
    *("max_position_embeddings", "tokenizer_type", "padded_vocab_size", "norm_epsilon", "bias_gelu_fusion"),
    *("rotary_base", "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
    *("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position_embeddings"),
    *("window_size", "attention_dropout", "hidden_dropout"),
)
# One value per exit, in the order of exit_layer_nums.
PER_EXIT = ("exit_layer_weight", "exit_layer_weight_init", "exit_layer_temperature")
# Of a Megatron checkpoint's arguments, those that say what the model and its data are.
_LEGACY_SECTIONS = ("model", "exits", "tokenizer", "data", "precision")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """A config as JSON-able data, nested by section; `from_dict` is its inverse."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in some.items()}
        for section, some in asdict(config).items()
    }


def from_dict(data: Mapping[str, Any], source: str = "config") -> RunConfig:
    """A config from `to_dict`'s data. Missing keys (of older versions) take their defaults.

    Raises ConfigError naming `source` and every unknown key or wrong type; the rules are not checked.
    """
    sections = {flag.section: None for flag in all_flags()}
    problems, values = [], {}
    for section, some in data.items():
        if section not in sections or not isinstance(some, Mapping):
            problems.append(unknown(section, sections))
            continue
        for name, value in some.items():
            flag = by_name().get(name)
            if flag is None or flag.section != section:
                problems.append(f"{section}.{unknown(name, by_name())}")
                continue
            try:
                values[name] = from_plain(flag, value)
            except ValueError as error:
                problems.append(f"{section}.{name}: {error}")
    raise_if_any(problems, source)
    return build(values, RunConfig())


def save_config(path: str | Path, config: RunConfig) -> None:
    """Write a config as YAML (`.yaml`, `.yml`) or JSON; `--config` reads it. A reader never sees half a file.

    Raises StorageError naming the path if it cannot be written.
    """
    path, data = Path(path), to_dict(config)
    as_yaml = path.suffix in (".yaml", ".yml")
    text = yaml.safe_dump(data, sort_keys=False) if as_yaml else json.dumps(data, indent=2) + "\n"
    try:
        with atomic_write(str(path)) as file:
            file.write(text.encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot write the configuration: {error.strerror}") from error


def from_checkpoint(stored: Mapping[str, Any], source: str = "checkpoint") -> RunConfig:
    """The config that a checkpoint was trained with: enough to evaluate or generate.

    `stored` is `to_dict`'s data, or the arguments of a Megatron checkpoint, of which model, exits, tokenizer,
    data and precision are taken. Raises ConfigError naming `source` if model or exits break a rule.
    """
    if _is_native(stored):
        config = from_dict(stored, source)
    else:
        config = build(_from_legacy(stored, source), RunConfig())
    check(config, run=False, where=source)
    return config


def merge_checkpoint_args(
    config: RunConfig, given: Collection[str], stored: Mapping[str, Any], source: str
) -> RunConfig:
    """`--use-checkpoint-args`: take the model's shape from a checkpoint, and log in one line what was taken.

    Fields in FORCED come from the checkpoint whatever was given, those in FILLED only if they are not among the
    `given` names. Raises ConfigError naming `source` if the merged config breaks a rule.
    """
    if _is_native(stored):
        source_config = from_dict(stored, source)
        theirs = {flag.name: value_of(source_config, flag) for flag in all_flags()}
    else:
        theirs = _from_legacy(stored, source)
    ours = {flag.name: value_of(config, flag) for flag in all_flags()}
    differs = [name for name in (*FORCED, *FILLED) if _says(theirs, name) and theirs[name] != ours[name]]
    taken = {name: theirs[name] for name in differs if name in FORCED or name not in given}
    _log_merge(source, taken, {name: ours[name] for name in differs}, set(given))
    merged = build(taken, config)
    check(merged, where=f"with --use-checkpoint-args from {source}")
    return merged


def _says(theirs: Mapping[str, Any], name: str) -> bool:
    """Whether a checkpoint has a value for a field; no weights at all leave the given ones alone."""
    value = theirs.get(name)
    return value is not None and not (name in PER_EXIT and value == ())


def _log_merge(source: str, taken: Mapping[str, Any], ours: Mapping[str, Any], given: set[str]) -> None:
    """Say in one line what came from the checkpoint and who won where both spoke."""
    parts = [", ".join(f"{name} {_show(value)}" for name, value in taken.items() if name not in given)]
    for name, value in ours.items():
        if name in given and name in taken:
            parts.append(f"{name} {_show(taken[name])} overrules the given {_show(value)}")
        elif name in given:
            parts.append(f"{name} stays {_show(value)} as given")
    _logger.info("--use-checkpoint-args, from %s: %s", source, "; ".join(filter(None, parts)) or "no change")


def _show(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _is_native(stored: Mapping[str, Any]) -> bool:
    return isinstance(stored.get("model"), Mapping)


def _from_legacy(args: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our fields' values from a Megatron checkpoint's arguments; absent and empty ones are left out."""
    values: dict[str, Any] = {"position_embedding_type": _legacy_positions(args)}
    if args.get("use_exit_norm") is not None:
        values["exit_norm"] = "own" if args["use_exit_norm"] else "none"
    problems = []
    for name, value in args.items():
        spelling = spellings().get("--" + name.replace("_", "-"))
        flag = by_name().get(name) or (spelling.flag if spelling and spelling.constant is None else None)
        if flag is None or flag.section not in _LEGACY_SECTIONS or flag.name in values or value is None:
            continue
        try:
            values[flag.name] = from_plain(flag, value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    raise_if_any(problems, source)
    # The original's converter adds exits and leaves these lists as long as they were.
    stale = [name for name in PER_EXIT if len(values.get(name, ())) != len(values.get("exit_layer_nums", ()))]
    return {name: value for name, value in values.items() if name not in stale}


def _legacy_positions(args: Mapping[str, Any]) -> str:
    if args.get("use_rotary_position_embeddings") or args.get("position_embedding_type") == "rope":
        return "rope"
    return "learned_absolute" if args.get("add_position_embedding", True) else "none"
