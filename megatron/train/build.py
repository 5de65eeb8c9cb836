"""From a config to a trainer: plain functions, one per part."""

from dataclasses import asdict

import torch

from megatron.checkpoint.together import Together
from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.model.build import build_model, padded_rows
from megatron.model.gpt import GPT
from megatron.model.partition import StageSpec, replicas, stages_of
from megatron.model.stage import Stage
from megatron.nn.fp8 import use_fp8
from megatron.nn.linear import defer_weight_gradients
from megatron.optim.gradient_sync import Home, Shared
from megatron.optim.lr import LrSchedule, WeightDecaySchedule
from megatron.optim.optimizer import TrainingOptimizer
from megatron.optim.scaler import LossScaler
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh
from megatron.parallel.p2p import PipelineLink
from megatron.planning.costs import stage_costs
from megatron.schedule.simulate import Costs
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.train.batch_size import global_batch_sizes, training_length
from megatron.train.plan import splits_backward
from megatron.train.spikes import SpikeWatch
from megatron.train.trainer import Trainer
from megatron.train.tuning import untie_heads


def build_trainer(
    config: RunConfig, backend: Backend | None = None, dtype: torch.dtype | None = None, mesh: Mesh | None = None
) -> Trainer:
    """Make all parts of a training run; parameters are still uninitialised (see `checkpoints.start`).

    dtype: of parameters, where it isn't the config's. mesh: where it is not to be made of all ranks launched.
    """
    config = untie_heads(config)
    if mesh is None:
        mesh = Mesh.build(config.parallel, backend or Backend.choose(config.parallel.distributed_backend))
    _check_batch(config, mesh.size("dp"))
    tokenizer = make_tokenizer(config)
    model = _build_model(config, mesh, tokenizer.vocab_size, dtype)
    later = None
    if splits_backward(config.parallel):
        if config.training.torch_compile or config.precision.fp8:
            raise ConfigError("--torch-compile and --fp8-format: such layers don't split backward as the schedule asks")
        later = defer_weight_gradients(model)
    shared, optimizer = find_shared(config, model, mesh), None
    if not config.training.skip_train:
        optimizer = TrainingOptimizer(
            model.named_parameters(), config.optimizer, mesh, shared, config.parallel.use_distributed_optimizer
        )
    partition = stages_of(config.model, config.exits, config.parallel)
    if mesh.backend.has_one_queue and len(partition) > mesh.size("pp") > 1:
        raise ConfigError(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 and several pipeline stages a rank: their messages would wait for each "
            "other for ever. Unset it (tensor parallelism overlaps without it here)"
        )
    trainer = Trainer(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        model=model,
        partition=partition,
        costs=_costs(config, partition, tokenizer.vocab_size),
        stages={spec.index: Stage(model, tokenizer.vocab_size, spec, later) for spec in model.stages},
        link=PipelineLink.build(mesh) if mesh.size("pp") > 1 else None,
        shared=shared,
        together=Together.of(mesh),
        peers=Together.of(mesh),
        optimizer=optimizer,
        scaler=build_scaler(config),
        lr=build_lr(config, mesh.size("dp")),
        weight_decay=build_weight_decay(config, mesh.size("dp")),
        spikes=SpikeWatch(config.training),
    )
    if optimizer is not None:
        for size in global_batch_sizes(config.training, mesh.size("dp")):
            trainer.plan(size // (config.training.micro_batch_size * mesh.size("dp")))  # or say now what can't be
    return trainer


def _build_model(config: RunConfig, mesh: Mesh, vocab_size: int, dtype: torch.dtype | None) -> GPT:
    """The model, with the kernels that the flags ask for."""
    try:
        model = build_model(config, mesh, vocab_size, dtype)
    except (MemoryError, RuntimeError) as error:  # how torch says that memory can't be had
        if "memory" not in str(error):
            raise
        raise ConfigError(
            f"a model of these sizes does not fit into memory (--hidden-size, --num-layers, --seq-length, the "
            f"vocabulary): {str(error).splitlines()[0][:200]}"
        ) from error
    if config.parallel.tune_exit:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("exits."))
    if config.precision.fp8:
        use_fp8(model, config.precision.fp8)
    if config.training.torch_compile:
        compile_layers(model)
    return model


def _costs(config: RunConfig, partition: tuple[StageSpec, ...], vocab_size: int) -> tuple[Costs, ...]:
    """What a microbatch costs on each stage, in FLOPs."""
    tokens = config.training.micro_batch_size * config.model.seq_length
    rows = padded_rows(config, vocab_size)
    return stage_costs(config.model, config.exits, partition, rows, tokens, training=config.training)


def _check_batch(config: RunConfig, dp_size: int) -> None:
    """The rule that needs the number of processes."""
    training = config.training
    unit = training.micro_batch_size * dp_size
    whole = {"--global-batch-size": training.global_batch_size or 0}
    if training.rampup_batch_size:
        start, increment, _ = training.rampup_batch_size
        whole |= {"--rampup-batch-size's first batch": start, "--rampup-batch-size's increment": increment}
    for name, size in whole.items():
        if size % unit:
            raise ConfigError(
                f"{name} {size} does not divide by --micro-batch-size {training.micro_batch_size} times {dp_size} "
                "data-parallel ranks: change one of them"
            )


def find_shared(config: RunConfig, model: GPT, mesh: Mesh) -> Shared:
    """Which parameters the ranks of the mesh have in common. Every rank must call this."""
    split, stages = model.splits, stages_of(config.model, config.exits, config.parallel)
    who = replicas(config.model, config.exits, stages, mesh.size("pp"))
    copies, foreign = [], set()
    for holders, prefixes in ((who.word, ("embedding.word.", "word_copy.")), (who.final_norm, ("final_norm.",))):
        names = tuple(name for name in split if name.startswith(prefixes))
        group = mesh.subgroup("pp", holders) if len(holders) > 1 else None
        if group is not None:
            copies.append((group, names))
        if holders[0] != mesh.rank("pp"):
            foreign |= set(names)
    return Shared(
        partial=frozenset(name for name, one in split.items() if one.partial),
        cut=frozenset(name for name, one in split.items() if one.dim is not None),
        copies=copies,
        foreign=frozenset(foreign),
        home=gradient_homes(model),
    )


def gradient_homes(model: GPT) -> dict[str, Home]:
    """The stage whose actions make each parameter's gradient, of those that one stage alone uses."""
    layers = {str(layer): stage.index for stage in model.stages for layer in range(stage.first, stage.last)}
    heads = {spec.label: stage.index for stage in model.stages for spec in stage.exits}
    homes: dict[str, Home] = {}
    for name, _ in model.named_parameters():
        room, _, rest = name.partition(".")
        module = rest.partition(".")[0]
        if room == "layers":
            homes[name] = (layers[module], False)
        elif room == "exits":
            homes[name] = (heads[module], True)
        elif room == "output":
            homes[name] = (model.stages[-1].index, True)
    return homes


def count_parameters(trainer: Trainer) -> int:
    """Parameters of the whole model, each counted once. Every rank must call this."""
    mine = trainer.shared.counted(dict(trainer.model.named_parameters()), trainer.mesh)
    total = torch.tensor(sum(p.numel() for p in mine.values()), device=trainer.mesh.backend.device)
    return int(trainer.mesh.sum(total)) // trainer.mesh.size("dp")


def compile_layers(model: GPT) -> None:
    """Run the layers, and the blocks and branches of exits, through torch.compile."""
    blocks = [head.block for head in model.exits.values() if head.block is not None]
    for layer in (*model.layers.values(), *blocks):
        layer.compile_body()
    for head in model.exits.values():
        if head.branch is not None:
            head.branch.compile()


def make_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the run's flags. Raises ConfigError where none is named."""
    if config.tokenizer.tokenizer_type is None:
        raise ConfigError("--tokenizer-type is missing: name the tokenizer that made the data")
    return build_tokenizer(**asdict(config.tokenizer))


def build_scaler(config: RunConfig) -> LossScaler:
    """Loss scaling: dynamic for fp16 unless fixed, none otherwise."""
    precision = config.precision
    if not precision.fp16:
        return LossScaler(scale=precision.loss_scale or 1.0)
    if precision.loss_scale is not None:
        return LossScaler(scale=precision.loss_scale)
    return LossScaler(
        scale=precision.initial_loss_scale,
        dynamic=True,
        min_scale=precision.min_loss_scale,
        window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        overflows_left=precision.hysteresis,
    )


def build_lr(config: RunConfig, dp_size: int) -> LrSchedule:
    """The learning-rate schedule, all lengths turned into samples."""
    flags, training = config.learning_rate, config.training
    unit = training.global_batch_size or training.micro_batch_size * dp_size
    decay = flags.lr_decay_samples or (flags.lr_decay_iters or 0) * unit or training_length(training, dp_size)[1]
    if flags.lr_warmup_fraction is not None:
        warmup = flags.lr_warmup_fraction * decay
    else:
        warmup = flags.lr_warmup_samples or flags.lr_warmup_iters * unit
    return LrSchedule(
        max_lr=flags.lr or 0.0,
        min_lr=flags.min_lr,
        style=flags.lr_decay_style,
        decay_samples=decay,
        warmup_samples=warmup,
        init_lr=flags.lr_warmup_init,
        wsd_style=flags.lr_wsd_decay_style,
        wsd_decay_samples=flags.lr_wsd_decay_samples or (flags.lr_wsd_decay_iters or 0) * unit,
    )


def build_weight_decay(config: RunConfig, dp_size: int) -> WeightDecaySchedule:
    """The weight-decay schedule over the whole run."""
    flags = config.optimizer
    if flags.weight_decay_incr_style == "constant":
        return WeightDecaySchedule(flags.weight_decay, flags.weight_decay)
    length = training_length(config.training, dp_size)[1]
    return WeightDecaySchedule(flags.start_weight_decay, flags.end_weight_decay, flags.weight_decay_incr_style, length)
