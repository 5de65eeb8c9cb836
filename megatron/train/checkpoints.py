"""What of a trainer goes into a checkpoint, and how one comes back: native or Megatron's, told apart by content."""

import dataclasses
from collections.abc import Collection, Container, Iterable
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import megatron_legacy, native
from megatron.checkpoint.find import NATIVE, Found, recognise, recognise_if_any
from megatron.checkpoint.part import EXITS, HOLDS
from megatron.checkpoint.run_facts import read_run_facts
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.state import MODEL, OPTIMIZER, PADDING, RunState, copy_into
from megatron.checkpoint.together import ALONE, Together
from megatron.config.load import from_checkpoint, save_config, to_dict
from megatron.config.run import CheckpointConfig, RunConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.logs import get_logger
from megatron.model.init import initialise
from megatron.model.names import model_state, named_parts
from megatron.optim.lr import LrSchedule, WeightDecaySchedule
from megatron.parallel.placement import Placed, views
from megatron.train import tuning
from megatron.train.trainer import Trainer

log = get_logger(__name__)

# What a model computes beyond the shapes of its tensors: a difference here would load silently wrong.
_MEANING = (
    ("model", "num_layers"), ("model", "hidden_size"), ("model", "num_attention_heads"), ("model", "num_kv_heads"),
    ("model", "position_embedding_type"), ("model", "rotary_base"), ("model", "rotary_percent"),
    ("model", "rotary_seq_len_interpolation_factor"), ("model", "use_rope_scaling"), ("model", "rope_scaling_factor"),
    ("model", "rope_low_freq_factor"), ("model", "rope_high_freq_factor"),
    ("model", "rope_original_max_position_embeddings"),
    ("model", "normalization"), ("model", "norm_epsilon"), ("model", "apply_layernorm_1p"),
    ("model", "apply_residual_connection_post_layernorm"), ("model", "activation"), ("model", "window_size"),
)  # fmt: skip
# Megatron's converters lose some of these, fusion flags (and with them the kind of GELU) among them.
_UNSURE_IN_MEGATRON = ("activation", "norm_epsilon", "rotary_seq_len_interpolation_factor", "window_size")
_SCHEDULE_FLAGS = {
    (LrSchedule, "max_lr"): "--lr",
    (LrSchedule, "min_lr"): "--min-lr",
    (LrSchedule, "style"): "--lr-decay-style",
    (LrSchedule, "decay_samples"): "samples of the decay (--lr-decay-iters or --train-iters x batch size)",
    (LrSchedule, "warmup_samples"): "samples of the warm-up (--lr-warmup-iters x batch size)",
    (LrSchedule, "init_lr"): "--lr-warmup-init",
    (LrSchedule, "wsd_style"): "--lr-wsd-decay-style",
    (LrSchedule, "wsd_decay_samples"): "samples of the last decay (--lr-wsd-decay-iters x batch size)",
    (WeightDecaySchedule, "start"): "--start-weight-decay (or --weight-decay)",
    (WeightDecaySchedule, "end"): "--end-weight-decay (or --weight-decay)",
    (WeightDecaySchedule, "style"): "--weight-decay-incr-style",
    (WeightDecaySchedule, "length"): "samples of the weight decay's increase (--train-iters x batch size)",
}
_EXIT_MEANING = ("exit_layer_nums", "pre_exit", "exit_norm")


def state_tensors(trainer: Trainer, *, optimizer: bool = True) -> dict[str, Placed]:
    """Checkpoint key -> live view and its place in the whole tensor, for all that this rank holds of the run."""
    model, vocab = trainer.model, trainer.vocab_size
    tensors = {MODEL + name: part for name, part in model_state(model, vocab).items()}
    if optimizer and trainer.optimizer is not None:
        for kind, name, tensor in trainer.optimizer.state_tensors():
            for part, placed in named_parts(name, tensor, model, vocab, trainer.optimizer.first_row(name)):
                tensors[f"{OPTIMIZER}{kind}/{part}"] = placed
    return tensors


def facts(trainer: Trainer) -> dict[str, Any]:
    """The JSON part of a checkpoint of this run."""
    progress = trainer.progress
    return {
        **dataclasses.asdict(progress),
        "optimizer_step": trainer.optimizer.steps,
        "grad_scaler": trainer.scaler.facts(),
        "spike_watch": trainer.spikes.facts(),
        "opt_param_scheduler": {
            "learning_rate": dataclasses.asdict(trainer.lr),
            "weight_decay": dataclasses.asdict(trainer.weight_decay),
        },
        "config": to_dict(trainer.config),
        "vocab_size": trainer.vocab_size,
        "padded_vocab_size": trainer.model.padded_vocab_size,
        "tokenizer": trainer.tokenizer.fingerprint,
        "torch": torch.__version__,
        **tuning.holds(trainer),
    }


def tensors_to_save(trainer: Trainer) -> dict[str, Placed]:
    """What this rank writes to a checkpoint: data-parallel ranks share out what they all hold."""
    mesh, optimizer = trainer.mesh, trainer.optimizer
    parts = state_tensors(trainer, optimizer=trainer.config.checkpoint.save_optim)
    if trainer.config.checkpoint.save_exits_only:
        parts = {name: part for name, part in parts.items() if tuning.is_of_exits(name)}
    sharded = optimizer is not None and optimizer.sync.sharded
    loads, mine = [0] * mesh.size("dp"), {}
    for name, part in parts.items():
        writer = mesh.rank("dp")
        if not (sharded and name.startswith(OPTIMIZER)):
            writer = loads.index(min(loads))  # the same on all: who has least so far
            loads[writer] += part.view.nbytes
        if writer == mesh.rank("dp"):
            mine[name] = part
    return mine


def capture(trainer: Trainer, snapshot: Snapshot | None = None) -> RunState:
    """What a checkpoint of this moment holds; with `snapshot` it stays as it is while training goes on."""
    parts = tensors_to_save(trainer)
    if snapshot is not None:
        taken = snapshot.take(views(parts))
        parts = {name: part._replace(view=taken[name]) for name, part in parts.items()}
    return RunState(parts, facts(trainer))


def write(
    config: RunConfig,
    state: RunState,
    tokenizer_files: Iterable[Path],
    given_up: Event | None = None,
    together: Together = ALONE,
) -> Path:
    """Write a native checkpoint under --save, with the other ranks that hold parts of it, unless it is given up;
    returns its directory.

    The config lies in the checkpoint and, for `--config`, as `config.yaml` beside it.
    """
    root = Path(config.checkpoint.save)
    directory = native.save(root, state.facts["iteration"], state, tokenizer_files, given_up, together)
    together.lead(lambda: save_config(root / "config.yaml", config))
    return directory


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of the run's present state under --save; returns its directory."""
    return write(trainer.config, capture(trainer), trainer.tokenizer.files(), together=trainer.together)


def start(trainer: Trainer, found: Found | None = None) -> None:
    """Give the trainer its first values: from --load where there is a checkpoint, else freshly drawn.

    `found`: the checkpoint that --load means, where it is known already.
    """
    found = trainer.together.lead(lambda: found or find(trainer.config))
    if found is None:
        initialise(trainer.model, trainer.config.training.seed, trainer.vocab_size)
        if trainer.optimizer is not None:
            trainer.optimizer.reset_masters()
        return
    load(trainer, found)
    log.info("loaded %s (%s format), going on from iteration %d", found.directory, found.format,
             trainer.progress.iteration)  # fmt: skip


def find(config: RunConfig) -> Found | None:
    """The checkpoint that --load means; None to start fresh.

    A --load that holds nothing is an error, except where --save is the same directory: the first start of a run
    that resumes itself.
    """
    flags = config.checkpoint
    if flags.load is None:
        return None
    root = Path(flags.load)
    found = recognise_if_any(root, flags.load_iteration or None)
    if found is not None:
        return found
    if flags.exit_on_missing_checkpoint or flags.save is None or root.resolve() != Path(flags.save).resolve():
        raise CheckpointError(
            f"--load {root} holds no checkpoint: check the path, or leave --load out to start from random weights"
        )
    log.info("no checkpoint in %s yet: starting from random weights", root)
    return None


def load(trainer: Trainer, found: Found) -> None:
    """Restore weights and, unless --finetune or --no-load-optim, optimizer and progress from `found`."""
    flags = trainer.config.checkpoint
    fresh = flags.finetune or found.release
    with_optimizer = flags.load_optim and not fresh and trainer.optimizer is not None
    targets = state_tensors(trainer, optimizer=with_optimizer)
    if trainer.tuning and found.format == NATIVE and native.read_facts(found.directory).get(HOLDS) == EXITS:
        frozen = {name: part for name, part in targets.items() if not tuning.is_of_exits(name)}
        _read(trainer, _backbone(flags, found), frozen, fresh=True)
        targets = {name: part for name, part in targets.items() if name not in frozen}
    about = _read(trainer, found, targets, fresh=fresh, with_optimizer=with_optimizer)
    if with_optimizer:
        trainer.optimizer.steps = about["optimizer_step"]
        trainer.scaler.restore(about.get("grad_scaler") or {})
        trainer.spikes.restore(about.get("spike_watch") or {})
    elif trainer.optimizer is not None:
        trainer.optimizer.reset_masters()
    if not fresh:
        _restore_progress(trainer, about)
        if with_optimizer:
            _restore_schedules(trainer, about)


def _backbone(flags: CheckpointConfig, exits: Found) -> Found:
    if flags.backbone is None:
        raise CheckpointError(
            f"{exits.directory} holds exits alone: name the checkpoint that they were tuned on with --backbone DIR"
        )
    return recognise(Path(flags.backbone))


def _read(
    trainer: Trainer, found: Found, targets: dict[str, Placed], *, fresh: bool, with_optimizer: bool = False
) -> dict[str, Any]:
    """Fill this rank's parts of a checkpoint's tensors; returns what else it says."""
    ignore, what = () if with_optimizer else (OPTIMIZER,), str(found.directory)
    elsewhere = frozenset().union(*trainer.peers.gather(frozenset(targets)))
    if found.format == NATIVE:
        about = read_run_facts(found.directory)
        _check_same_model(trainer.config, from_checkpoint(about["config"]), what)
        _check_same_tokenizer(trainer, about, what)
        if not fresh:
            _say_other_run(trainer.config, from_checkpoint(about["config"]), what)
        stored = native.tensor_index(found.directory).keys() if trainer.tuning else ()
        elsewhere |= _without_target(trainer, stored, targets)
        copies = tuning.copies_of_tied_heads(trainer, stored, targets)
        own = {name: part for name, part in targets.items() if name not in copies}
        native.load(found.directory, own, ignore=ignore, convert=True, elsewhere=elsewhere)
        for name, source in copies.items():
            native.load(found.directory, {source: targets[name]}, ignore=ignore, convert=True, elsewhere=stored)
        return about
    state = megatron_legacy.read(found.directory, trainer.vocab_size, with_optimizer=with_optimizer)
    _check_same_model(trainer.config, from_checkpoint(state.facts["args"]), what, _UNSURE_IN_MEGATRON)
    for name, source in tuning.copies_of_tied_heads(trainer, state.tensors.keys(), targets).items():
        state.tensors[name] = state.tensors[source]
    elsewhere |= _without_target(trainer, state.tensors.keys(), targets)
    _copy_own(state.tensors, targets, elsewhere, what)
    return state.facts


def _without_target(trainer: Trainer, stored: Collection[str], targets: Container[str]) -> frozenset[str]:
    """Tensors of a checkpoint that a tuning run leaves where they are."""
    behind = tuning.left_behind(trainer, stored)
    if trainer.tuning and trainer.config.checkpoint.backbone:
        behind |= {name for name in stored if name not in targets}  # of one checkpoint the exits, of one the rest
    return behind


def _copy_own(source: dict[str, Tensor], targets: dict[str, Placed], elsewhere: Container[str], what: str) -> None:
    """Copy this rank's part of a whole state; what has its target `elsewhere` is another rank's."""
    mine = {name: tensor for name, tensor in source.items() if name in targets or name not in elsewhere}
    whole = {name: tensor.shape for name, tensor in mine.items()}
    for name, part in targets.items():
        if name.endswith(PADDING) and name in mine:
            mine[name] = mine[name][part.offset[0] :]
        elif whole.get(name) == part.shape:  # else `copy_into` says what doesn't fit
            mine[name] = part.of(mine[name])
    copy_into(mine, views(targets), what, convert=True)


def _restore_progress(trainer: Trainer, about: dict[str, Any]) -> None:
    """Continue counting where the checkpoint stopped. `about` holds our names, or Megatron's."""
    progress = trainer.progress
    progress.iteration = about["iteration"]
    progress.consumed_samples = about.get("consumed_samples", about.get("consumed_train_samples", 0))
    legacy_steps = (about.get("opt_param_scheduler") or {}).get("num_steps", progress.consumed_samples)
    progress.optimizer_samples = about.get("optimizer_samples", legacy_steps)
    progress.skipped_steps = about.get("skipped_steps", 0)
    progress.run = about.get("run", 0) + 1
    progress.good = about.get("good", 0)


def _restore_schedules(trainer: Trainer, about: dict[str, Any]) -> None:
    """Hold the flags of learning rate and weight decay against the checkpoint's; see the two override flags."""
    flags = trainer.config.learning_rate
    saved = about.get("opt_param_scheduler")
    if not saved or flags.override_opt_param_scheduler:
        return
    lr, weight_decay = _read_schedules(saved, trainer)
    if flags.use_checkpoint_opt_param_scheduler:
        trainer.lr, trainer.weight_decay = lr, weight_decay
        return
    differing = [
        f"{_SCHEDULE_FLAGS[type(ours), field.name]}: checkpoint {getattr(theirs, field.name)}, now "
        f"{getattr(ours, field.name)}"
        for theirs, ours in ((lr, trainer.lr), (weight_decay, trainer.weight_decay))
        for field in dataclasses.fields(ours)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if differing:
        raise ConfigError(
            "the checkpoint's schedules are not those of the flags (" + "; ".join(differing) + "). Give "
            "--override-opt_param-scheduler to go on with the flags, or --use-checkpoint-opt_param-scheduler"
        )


def _read_schedules(saved: dict[str, Any], trainer: Trainer) -> tuple[LrSchedule, WeightDecaySchedule]:
    """Schedules from a checkpoint of ours, or from Megatron's names (all lengths in samples in both)."""
    if "learning_rate" in saved:
        return LrSchedule(**saved["learning_rate"]), WeightDecaySchedule(**saved["weight_decay"])
    lr = dataclasses.replace(
        trainer.lr,
        max_lr=saved["max_lr"],
        min_lr=saved["min_lr"],
        style=saved["lr_decay_style"],
        decay_samples=saved["lr_decay_steps"],
        warmup_samples=saved["lr_warmup_steps"],
    )
    constant = saved["wd_incr_style"] == "constant"
    length = trainer.weight_decay.length if constant else saved["wd_incr_steps"]
    return lr, WeightDecaySchedule(saved["start_wd"], saved["end_wd"], saved["wd_incr_style"], length)


def _check_same_model(ours: RunConfig, theirs: RunConfig, what: str, unsure: tuple[str, ...] = ()) -> None:
    """Refuse flags that would compute something else from the same tensors.

    Exits without tensors of their own may move freely (only said); where they own some, the comparison of tensor
    names finds other layers, and pre against post is found here.
    """
    differing = []
    for group, name in _MEANING:
        mine, saved = (getattr(getattr(config, group), name) for config in (ours, theirs))
        if mine != saved and name not in unsure:
            differing.append(f"{name}: checkpoint {saved}, flags {mine}")
    for name in _EXIT_MEANING:
        mine, saved = getattr(ours.exits, name), getattr(theirs.exits, name)
        if mine != saved and name == "pre_exit" and _own_tensors(ours) and _own_tensors(theirs):
            differing.append(f"pre_exit: checkpoint {saved}, flags {mine}")
        elif mine != saved:
            log.info("%s: %s was %s in the checkpoint and is %s now", what, name, saved, mine)
    if differing:
        raise CheckpointError(
            f"{what} is a checkpoint of another model ({'; '.join(differing)}): "
            + (
                "leave these flags out"
                if ours.checkpoint.use_checkpoint_args
                else "change the flags, or give --use-checkpoint-args"
            )
        )


def _say_other_run(ours: RunConfig, theirs: RunConfig, what: str) -> None:
    """Name what else is not as before on resume: allowed, but then it isn't the run that never stopped."""
    pairs = {("training", "seed"), ("training", "calculate_per_token_loss")}
    for group in ("data", "optimizer", "precision"):
        pairs |= {(group, field.name) for field in dataclasses.fields(getattr(ours, group))}
    pairs -= {("data", "num_workers"), ("data", "data_cache_path")}
    differing = []
    for group, name in sorted(pairs):
        mine, saved = (getattr(getattr(config, group), name) for config in (ours, theirs))
        if mine != saved:
            differing.append(f"{name}: {saved} -> {mine}")
    if differing:
        log.warning("not as when %s was saved: %s", what, "; ".join(differing))


def _own_tensors(config: RunConfig) -> bool:
    """Whether exits have parameters that are not the model's."""
    exits = config.exits
    own = exits.untie_exit_output_weights or exits.use_exit_mlp or exits.use_exit_block or exits.exit_norm == "own"
    return bool(exits.exit_layer_nums) and own


def _check_same_tokenizer(trainer: Trainer, about: dict[str, Any], what: str) -> None:
    if about["tokenizer"] != trainer.tokenizer.fingerprint and not trainer.config.checkpoint.finetune:
        raise CheckpointError(
            f"{what} was trained with another tokenizer: use the one in {what}/tokenizer, or --finetune to change it"
        )
