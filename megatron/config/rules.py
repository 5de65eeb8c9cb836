"""What a configuration must satisfy: `check` reports every broken rule at once, each line naming flags and mend.

Ranges of single values are a table here; rules across fields live in rules_model.py and rules_run.py.
"""

from collections.abc import Iterator

from megatron.config.fields import all_flags, value_of
from megatron.config.problems import raise_if_any
from megatron.config.rules_model import MODEL_RULES
from megatron.config.rules_parallel import PARALLEL_RULES
from megatron.config.rules_run import RUN_RULES
from megatron.config.run import RunConfig

AT_LEAST_ONE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("num_query_groups", "seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"),
    *("padded_vocab_size", "window_size", "rope_original_max_position_embeddings", "vocab_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size"),
    *("num_layers_per_virtual_pipeline_stage", "tune_exit_pipeline_parallel_size"),
    *("global_batch_size", "train_iters", "train_samples", "eval_interval", "exit_interval"),
    *(
        "keep_last_n_checkpoints",
        "recompute_num_layers",
        "max_nonfinite_steps",
        "hysteresis",
        "save_interval",
        "log_interval",
    ),
    *("tracker_log_interval", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters"),
    "lr_wsd_decay_samples",
)
ABOVE_ZERO = (
    *("rotary_base", "rotary_seq_len_interpolation_factor", "rope_scaling_factor", "rope_low_freq_factor"),
    *("rope_high_freq_factor", "norm_epsilon", "exit_duration_in_mins", "spike_factor"),
    *("distributed_timeout_minutes", "backward_forward_ratio"),
    *("adam_eps", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window"),
)
NOT_NEGATIVE = (
    *("init_method_std", "exit_layer_weight_warmup_iters", "vocab_extra_ids", "num_workers"),
    *("eval_iters", "weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad", "lr", "min_lr"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init", "load_iteration"),
    *("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches"),
)
_SHAPE = ("model", "exits")
_PATHS = ("DIR", "FILE", "PATH")  # metavars of flags that name one


def _out_of_range(config: RunConfig, shape: bool, run: bool) -> Iterator[str]:
    """Faults of single numbers and paths and, in a config that was not read from flags, of single choices."""
    for flag in all_flags():
        value = value_of(config, flag)
        if value is None or not (shape if flag.section in _SHAPE else run):
            continue
        if flag.choices and value not in flag.choices:
            yield f"{flag.flag}: {value!r} is not one of {', '.join(flag.choices)}"
        elif flag.name in AT_LEAST_ONE and value < 1:
            yield f"{flag.flag} must be at least 1, got {value}"
        elif flag.name in ABOVE_ZERO and value <= 0:
            yield f"{flag.flag} must be above 0, got {value}"
        elif flag.name in NOT_NEGATIVE and value < 0:
            yield f"{flag.flag} must not be negative, got {value}"
        elif flag.metavar in _PATHS and value == "":
            yield f"{flag.flag} is empty: give a path, or leave the flag out"


def broken(config: RunConfig, shape: bool = True, run: bool = True) -> list[str]:
    """One line for every broken rule: those of model and exits (`shape`) and all others (`run`)."""
    rules = (*(MODEL_RULES if shape else ()), *((*PARALLEL_RULES, *RUN_RULES) if run else ()))
    return [*_out_of_range(config, shape, run), *(fault for rule in rules for fault in rule(config))]


def check(config: RunConfig, shape: bool = True, run: bool = True, where: str = "") -> None:
    """Raise one ConfigError naming every broken rule; `where` names the config's source in front of it.

    Without `shape` the rules of model and exits wait, because a checkpoint is still to be asked; without `run`
    only they are asked, because a stored config is read for its model.
    """
    raise_if_any(broken(config, shape, run), where)


def check_training(config: RunConfig) -> None:
    """Raise one ConfigError naming everything that training needs and a valid config may lack."""
    training, data = config.training, config.data
    missing = []
    if training.train_iters is None and training.train_samples is None and not training.skip_train:
        missing.append("--train-iters (or --train-samples) is missing: say how long to train")
    if not (data.data_path or data.train_data_path or (training.skip_train and data.valid_data_path)):
        missing.append("--data-path (or --train-data-path) is missing: training needs data")
    if config.tokenizer.tokenizer_type is None and config.checkpoint.load is None:
        missing.append("--tokenizer-type is missing: it gives the vocabulary and the end-of-document token")
    raise_if_any(missing)
