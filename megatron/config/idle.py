"""Settings that are allowed but do nothing beside the others: said once, so that nobody relies on them."""

from collections.abc import Callable, Iterator

from megatron.config.fields import by_name, value_of
from megatron.config.run import RunConfig


def _tokenizer_uses(*types: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.tokenizer.tokenizer_type in (None, *types)


# fields, when they do something, and what is lacking where they don't
_ROWS: tuple[tuple[tuple[str, ...], Callable[[RunConfig], bool], str], ...] = (
    (("sequence_parallel",), lambda c: c.parallel.tensor_model_parallel_size > 1, "with one tensor-parallel rank"),
    (
        ("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches", "fill_loss_normalization"),
        lambda c: c.parallel.fill_explicit_bubbles,
        "without --fill-explicit-bubbles",
    ),
    (
        ("save_interval", "keep_last_n_checkpoints", "async_save"),
        lambda c: c.checkpoint.save is not None,
        "without --save",
    ),
    (
        ("load_iteration", "load_optim", "finetune", "exit_on_missing_checkpoint"),
        lambda c: c.checkpoint.load is not None,
        "without --load",
    ),
    (("device",), lambda c: c.logging.dry_run, "without --dry-run"),
    (
        ("exit_layer_weight_init", "exit_layer_weight_warmup_style"),
        lambda c: c.exits.exit_layer_weight_warmup_iters > 0,
        "without --exit-layer-weight-warmup-iters",
    ),
    (
        ("rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor", "use_rope_scaling"),
        lambda c: c.model.position_embedding_type == "rope",
        "without --position-embedding-type rope",
    ),
    (
        ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor",
         "rope_original_max_position_embeddings"),
        lambda c: c.model.use_rope_scaling,
        "without --use-rope-scaling",
    ),
    (
        ("adam_beta1", "adam_beta2", "adam_eps", "adam_implementation"),
        lambda c: c.optimizer.optimizer == "adam",
        "with --optimizer sgd",
    ),
    (("sgd_momentum",), lambda c: c.optimizer.optimizer == "sgd", "without --optimizer sgd"),
    (
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        lambda c: c.learning_rate.lr_decay_style == "WSD",
        "without --lr-decay-style WSD",
    ),
    (
        ("lr_warmup_init",),
        lambda c: bool(
            c.learning_rate.lr_warmup_iters or c.learning_rate.lr_warmup_samples or c.learning_rate.lr_warmup_fraction
        ),
        "without a warm-up",
    ),
    (
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        lambda c: c.precision.fp16,
        "without --fp16",
    ),
    (
        ("wandb_group", "wandb_exp_name", "wandb_save_dir"),
        lambda c: c.logging.wandb_project is not None,
        "without --wandb-project",
    ),
    (
        ("spike_factor",),
        lambda c: c.training.check_for_spiky_loss or c.training.check_for_large_grads,
        "without --check-for-spiky-loss or --check-for-large-grads",
    ),
    (("vocab_file", "merge_file"), _tokenizer_uses("GPT2BPETokenizer"), "with this --tokenizer-type"),
    (("vocab_size",), _tokenizer_uses("NullTokenizer"), "with this --tokenizer-type"),
    (
        ("tokenizer_model",),
        lambda c: c.tokenizer.tokenizer_type not in ("GPT2BPETokenizer", "NullTokenizer"),
        "with this --tokenizer-type",
    ),
)  # fmt: skip


def without_effect(config: RunConfig) -> Iterator[str]:
    """One line for each group of settings that differ from their defaults and change nothing here."""
    flags = by_name()
    plain = RunConfig()
    for names, active, lack in _ROWS:
        idle = [flags[name].flag for name in names if value_of(config, flags[name]) != value_of(plain, flags[name])]
        if idle and not active(config):
            yield f"without effect {lack}: {', '.join(idle)}"
