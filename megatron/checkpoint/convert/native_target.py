"""Writes a native checkpoint, tensors as they are asked for, with its tokenizer and facts that a run can go on from."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import native
from megatron.checkpoint.convert.base import Check, Layout, Source, Trained, check_free
from megatron.checkpoint.find import iteration_name
from megatron.checkpoint.state import MODEL, OPTIMIZER, RunState
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.stored import to_dict
from megatron.tokenizer.build import build_tokenizer, padded_vocab_size

_NO_SCALING = {"scale": 1.0, "growth_tracker": 0, "hysteresis_tracker": 2}


def write(source: Source, root: Path, layout: Layout, check: Check) -> Path:
    """Write `source`, whose vocabulary is that of its tokenizer, as `<root>/iter_*` and point the tracker at it.

    Any layout reads it; the one asked for is merely what its config says. Errors as of every Writer; ConfigError where
    the tokenizer is missing.
    """
    check_free(root / iteration_name(source.iteration))
    config = source.config
    words = build_tokenizer(**asdict(config.tokenizer))
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tp or config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pp or config.parallel.pipeline_model_parallel_size,
    )
    config = replace(config, parallel=parallel)
    moments = source.moments() if isinstance(source, Trained) else {}
    specs = {MODEL + name: spec for name, spec in source.specs().items()} | dict(moments)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    trained = source.training_facts() if isinstance(source, Trained) and moments else {}
    facts = _facts(config, source.facts, trained) | {
        "config": to_dict(config),
        "vocab_size": words.vocab_size,
        "padded_vocab_size": config.model.padded_vocab_size
        or padded_vocab_size(words.vocab_size, config.model.make_vocab_size_divisible_by, layout.tp or 1),
        "tokenizer": words.fingerprint,
        "torch": torch.__version__,
    }

    def read(key: str) -> torch.Tensor:
        return source.read(key if key.startswith(OPTIMIZER) else key.removeprefix(MODEL))

    return native.save(
        root, source.iteration, RunState(tensors, facts), words.files(), streamed=native.Streamed(read, check)
    )


def _facts(config: RunConfig, stored: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """What a run asks a checkpoint, as far as `stored` (facts of ours, or of a source in another format) knows it."""
    samples = stored.get("consumed_samples", 0)
    theirs = trained.get("opt_param_scheduler") or {}
    facts = {
        "consumed_samples": samples,
        "optimizer_samples": theirs.get("num_steps", samples),
        "optimizer_step": 0,
        "skipped_steps": 0,
        "run": 0,
        "good": 0,
        "grad_scaler": _NO_SCALING,
        "opt_param_scheduler": _schedules(config, theirs),
    }
    ours = {name: stored[name] for name in (*facts, "spike_watch") if name in stored}
    of_steps = {name: trained[name] for name in ("optimizer_step", "grad_scaler") if trained.get(name) is not None}
    return facts | ours | of_steps


def _schedules(config: RunConfig, theirs: dict[str, Any]) -> dict[str, Any]:
    """Learning rate and weight decay by Megatron's names for them, else by the config; lengths in samples."""
    lr, optimizer = config.learning_rate, config.optimizer
    style = theirs.get("wd_incr_style", "constant")
    return {
        "learning_rate": {
            "max_lr": theirs.get("max_lr", lr.lr or 0.0),
            "min_lr": theirs.get("min_lr", lr.min_lr),
            "style": theirs.get("lr_decay_style", lr.lr_decay_style),
            "decay_samples": theirs.get("lr_decay_steps", lr.lr_decay_samples or 0),
            "warmup_samples": theirs.get("lr_warmup_steps", lr.lr_warmup_samples),
            "init_lr": lr.lr_warmup_init,
            "wsd_style": lr.lr_wsd_decay_style,
            "wsd_decay_samples": lr.lr_wsd_decay_samples or 0,
        },
        "weight_decay": {
            "start": theirs.get("start_wd", optimizer.weight_decay),
            "end": theirs.get("end_wd", optimizer.weight_decay),
            "style": style,
            "length": 0 if style == "constant" else theirs["wd_incr_steps"],
        },
    }
