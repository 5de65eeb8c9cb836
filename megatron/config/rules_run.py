"""Rules of the run: parallel sizes, data, batches, optimizer, learning rate, precision, checkpoints.

Each function yields what is wrong with a config, naming flags and mend.
"""

from collections.abc import Callable, Iterator

from megatron.config.mixture import parse_blend, parse_split
from megatron.config.run import RunConfig
from megatron.errors import ConfigError

Faults = Iterator[str]


def data_paths_exclude(config: RunConfig) -> Faults:
    names = ("train_data_path", "valid_data_path", "test_data_path")
    own = [f"--{name.replace('_', '-')}" for name in names if getattr(config.data, name)]
    if config.data.data_path and own:
        yield f"--data-path and {', '.join(own)} exclude each other: give one split data set or separate ones"


def blends_are_pairs(config: RunConfig) -> Faults:
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(config.data, name)
        if words:
            yield from _refusal(parse_blend, words, f"--{name.replace('_', '-')}")


def split_is_sane(config: RunConfig) -> Faults:
    yield from _refusal(parse_split, config.data.split)


def _refusal(parse: Callable[..., object], *words: object) -> Faults:
    """What a parser says against some words, if anything."""
    try:
        parse(*words)
    except ConfigError as error:
        yield str(error)


def tokenizer_files(config: RunConfig) -> Faults:
    tokenizer, kind = config.tokenizer, config.tokenizer.tokenizer_type
    needed = {None: (), "GPT2BPETokenizer": ("vocab_file", "merge_file"), "NullTokenizer": ("vocab_size",)}
    if config.checkpoint.load:  # a checkpoint holds its tokenizer's files
        return
    for name in needed.get(kind, ("tokenizer_model",)):
        if getattr(tokenizer, name) is None:
            yield f"--tokenizer-type {kind} needs --{name.replace('_', '-')}: give it"


def one_length(config: RunConfig) -> Faults:
    if config.training.train_iters is not None and config.training.train_samples is not None:
        yield "--train-iters and --train-samples exclude each other: give one of them"


def micro_divides_global(config: RunConfig) -> Faults:
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole and micro > 0 and whole % micro:
        yield f"--micro-batch-size {micro} does not divide --global-batch-size {whole}: choose a divisor"


def seed_range(config: RunConfig) -> Faults:
    if not 0 <= config.training.seed < 2**32:
        yield f"--seed must lie in [0, 2**32), got {config.training.seed}"


def rampup_numbers(config: RunConfig) -> Faults:
    ramp = config.training.rampup_batch_size
    if ramp and (len(ramp) != 3 or min(ramp) < 1):
        yield (
            f"--rampup-batch-size {' '.join(map(str, ramp))}: give three whole numbers, "
            "each above 0: the first batch, the increment and the samples it takes"
        )


def rampup_needs(config: RunConfig) -> Faults:
    training = config.training
    if training.rampup_batch_size and training.global_batch_size is None:
        yield "--rampup-batch-size needs --global-batch-size, the batch that it ends with"
    if training.rampup_batch_size and training.train_samples is None:
        yield "--rampup-batch-size needs --train-samples: it counts samples, not iterations"


def rampup_divides(config: RunConfig) -> Faults:
    ramp, training = config.training.rampup_batch_size, config.training
    if any(rampup_numbers(config)) or not ramp or not training.global_batch_size:
        return
    start, increment, _ = ramp
    grow = training.global_batch_size - start
    if grow < 0 or grow % increment:
        yield f"--rampup-batch-size: {increment} does not lead from {start} to --global-batch-size {start + grow}"
    micro = max(1, training.micro_batch_size)
    if start % micro or increment % micro:
        yield (
            f"--rampup-batch-size: --micro-batch-size {micro} must divide the first batch {start} "
            f"and the increment {increment}"
        )


def recompute_full(config: RunConfig) -> Faults:
    training = config.training
    if training.recompute_granularity != "full":
        return
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(training, name) is None:
            yield f"--recompute-granularity full needs --{name.replace('_', '-')}: give it"


def recompute_others(config: RunConfig) -> Faults:
    training = config.training
    if training.recompute_granularity == "full":
        return
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(training, name) is not None:
            yield f"--{name.replace('_', '-')} belongs to --recompute-granularity full: add that or drop it"


def recompute_depth(config: RunConfig) -> Faults:
    number, depth = config.training.recompute_num_layers, config.model.num_layers
    if number and depth and number > depth:
        yield f"--recompute-num-layers {number} is more than --num-layers {depth}"


def weight_decay_style(config: RunConfig) -> Faults:
    optimizer = config.optimizer
    for name in ("start_weight_decay", "end_weight_decay"):
        flag, given = f"--{name.replace('_', '-')}", getattr(optimizer, name) is not None
        if optimizer.weight_decay_incr_style == "constant" and given:
            yield f"{flag} needs --weight-decay-incr-style linear or cosine; for a constant one use --weight-decay"
        if optimizer.weight_decay_incr_style != "constant" and not given:
            yield f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs {flag}: give it"


def weight_decay_grows(config: RunConfig) -> Faults:
    start, end = config.optimizer.start_weight_decay, config.optimizer.end_weight_decay
    if start is not None and end is not None and start > end:
        yield f"--start-weight-decay {start:g} is above --end-weight-decay {end:g}: weight decay only grows"


def moments_range(config: RunConfig) -> Faults:
    for name in ("adam_beta1", "adam_beta2", "sgd_momentum"):
        value = getattr(config.optimizer, name)
        if not 0 <= value < 1:
            yield f"--{name.replace('_', '-')} must lie in [0, 1), got {value:g}"


def lr_needed(config: RunConfig) -> Faults:
    training = config.training
    length = training.train_iters if training.train_iters is not None else training.train_samples
    if length is not None and not training.skip_train and config.learning_rate.lr is None:
        yield "--lr is missing: training needs a peak learning rate"


def lr_order(config: RunConfig) -> Faults:
    rate = config.learning_rate
    for name in ("min_lr", "lr_warmup_init"):
        if rate.lr is not None and getattr(rate, name) > rate.lr:
            yield f"--{name.replace('_', '-')} {getattr(rate, name):g} is above --lr {rate.lr:g}"


def warmup_once(config: RunConfig) -> Faults:
    rate = config.learning_rate
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        if rate.lr_warmup_fraction is not None and getattr(rate, name):
            yield f"--lr-warmup-fraction and --{name.replace('_', '-')} exclude each other: give one of them"


def warmup_share(config: RunConfig) -> Faults:
    share = config.learning_rate.lr_warmup_fraction
    if share is not None and not 0 <= share < 1:
        yield f"--lr-warmup-fraction must lie in [0, 1), got {share:g}"


def one_unit(config: RunConfig) -> Faults:
    by_iters, by_samples = config.training.train_iters is not None, config.training.train_samples is not None
    for kind in ("lr-decay", "lr-warmup", "lr-wsd-decay"):
        for unit, other, wrong in (("samples", "iters", by_iters), ("iters", "samples", by_samples)):
            if wrong and getattr(config.learning_rate, f"{kind}-{unit}".replace("-", "_")):
                yield f"--{kind}-{unit} does not go with --train-{other}: use --{kind}-{other}"


def _lengths(config: RunConfig) -> tuple[str, int, int, int]:
    """Unit, and lengths of decay, warm-up and WSD's final decay (0 where not given) in it."""
    training, rate = config.training, config.learning_rate
    unit = "samples" if training.train_samples is not None else "iters"
    decay = getattr(rate, f"lr_decay_{unit}") or getattr(training, f"train_{unit}") or 0
    warmup = getattr(rate, f"lr_warmup_{unit}") or int(min(1, rate.lr_warmup_fraction or 0) * decay)
    return unit, decay, warmup, getattr(rate, f"lr_wsd_decay_{unit}") or 0


def warmup_fits(config: RunConfig) -> Faults:
    unit, decay, warmup, final = _lengths(config)
    if decay and warmup >= decay:
        yield f"--lr-warmup-{unit} {warmup} must be below the length of the decay, {decay} {unit}"
    elif decay and warmup + final > decay:
        yield f"--lr-wsd-decay-{unit} {final} does not fit after {warmup} {unit} of warm-up into {decay} {unit}"


def wsd_length(config: RunConfig) -> Faults:
    unit, decay, _, final = _lengths(config)
    wsd = config.learning_rate.lr_decay_style == "WSD"
    if wsd and decay and not final:
        yield f"--lr-decay-style WSD needs the length of its final decay: give --lr-wsd-decay-{unit}"
    if final and not wsd:
        yield f"--lr-wsd-decay-{unit} belongs to --lr-decay-style WSD: add that or drop it"


def one_resume_rule(config: RunConfig) -> Faults:
    rate = config.learning_rate
    if rate.override_opt_param_scheduler and rate.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other: "
            "give one of them"
        )


def one_precision(config: RunConfig) -> Faults:
    if config.precision.fp16 and config.precision.bf16:
        yield "--fp16 and --bf16 exclude each other: give one of them"
    if config.precision.fp8 and not config.precision.bf16:
        yield "--fp8-format multiplies weights of 16 bits: add --bf16"


def loss_scale_use(config: RunConfig) -> Faults:
    precision = config.precision
    if precision.loss_scale is not None and not precision.fp16:
        yield "--loss-scale is for --fp16: add that or drop it"
    if precision.min_loss_scale > precision.initial_loss_scale:
        yield (
            f"--min-loss-scale {precision.min_loss_scale:g} is above --initial-loss-scale "
            f"{precision.initial_loss_scale:g}"
        )


def load_needed(config: RunConfig) -> Faults:
    checkpoint = config.checkpoint
    if checkpoint.load is None:
        if checkpoint.use_checkpoint_args:
            yield "--use-checkpoint-args needs a checkpoint: give --load DIR"
        if checkpoint.load_iteration:
            yield f"--load-iteration {checkpoint.load_iteration} needs a checkpoint: give --load DIR"


def save_format(config: RunConfig) -> Faults:
    if config.checkpoint.ckpt_format == "megatron" and config.checkpoint.save is not None:
        yield "--ckpt-format megatron: this version reads Megatron's format but saves the native one; use native"


RUN_RULES = (
    data_paths_exclude,
    blends_are_pairs,
    split_is_sane,
    tokenizer_files,
    one_length,
    micro_divides_global,
    seed_range,
    rampup_numbers,
    rampup_needs,
    rampup_divides,
    recompute_full,
    recompute_others,
    recompute_depth,
    weight_decay_style,
    weight_decay_grows,
    moments_range,
    lr_needed,
    lr_order,
    warmup_once,
    warmup_share,
    one_unit,
    warmup_fits,
    wsd_length,
    one_resume_rule,
    one_precision,
    loss_scale_use,
    load_needed,
    save_format,
)
