"""The config that a checkpoint carries, ready to use: `--load DIR` alone says what the model and tokenizer are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.checkpoint import megatron_legacy, native
from megatron.checkpoint.find import FACTS, NATIVE, Found
from megatron.checkpoint.typed import mapping
from megatron.config.data import TokenizerConfig
from megatron.config.run import CheckpointConfig, LoggingConfig, RunConfig
from megatron.config.stored import from_checkpoint


def stored_args(found: Found) -> dict[str, Any]:
    """The stored config as data: ours nested by section, or a Megatron checkpoint's flat arguments.

    Raises CheckpointError if the checkpoint is damaged or carries no config.
    """
    if found.format == NATIVE:
        where = str(found.directory / FACTS)
        config = mapping(native.read_facts(found.directory), "config", where)
        mapping(config, "model", f"{where}, config")
        return dict(config)
    return megatron_legacy.read_args(found.directory)


def stored_config(found: Found) -> RunConfig:
    """The run's config, with its tokenizer taken from the checkpoint's own files where it has them.

    What belongs to one start of a run (checkpoint and logging flags, reasons to stop) is left at its defaults.
    """
    config = from_checkpoint(stored_args(found), str(found.directory))
    training = replace(config.training, exit_interval=None, exit_duration_in_mins=None, skip_train=False)
    config = replace(config, checkpoint=CheckpointConfig(), logging=LoggingConfig(), training=training)
    if found.format == NATIVE:
        config = replace(config, tokenizer=_own_tokenizer(found.directory, config.tokenizer))
    return config


def _own_tokenizer(directory: Path, config: TokenizerConfig) -> TokenizerConfig:
    """The same tokenizer, read from the copies of its files inside the checkpoint."""
    files = native.tokenizer_files(directory)
    changes: dict[str, str] = {}
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        given = getattr(config, name)
        if given is None:
            continue
        inside = files.get(Path(given).name)
        if inside is None and files:  # the flag named a directory of files
            inside = next(iter(files.values())).parent
        if inside is not None:
            changes[name] = str(inside)
    return replace(config, **changes)
