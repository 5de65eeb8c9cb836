"""How the model is trained: batches, optimizer, learning rate, precision. Frozen values, no torch."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.setting import setting


@dataclass(frozen=True)
class TrainingConfig:
    """Batch sizes, length of the run, memory savers, evaluation, and when to stop."""

    micro_batch_size: int = setting(1, "Sequences per forward pass and dp rank.")
    global_batch_size: int | None = setting(
        None, "Sequences per optimizer step. Default: micro batch x data-parallel size."
    )
    rampup_batch_size: tuple[int, ...] = setting(
        (),
        "Grow the global batch from START, by INCREMENT at a time, to --global-batch-size over SAMPLES samples.",
        metavar="START INCREMENT SAMPLES",
    )
    train_iters: int | None = setting(None, "Optimizer steps to run (or --train-samples).")
    train_samples: int | None = setting(None, "Sequences to train on (or --train-iters).")
    seed: int = setting(1234, "Seed of initial values, dropout and data order.")
    eval_iters: int = setting(100, "Global batches per evaluation.")
    eval_interval: int = setting(1000, "Iterations between evaluations.")
    skip_train: bool = setting(False, "Only evaluate, then stop.")
    exit_interval: int | None = setting(None, "Stop (with a checkpoint) after an iteration divisible by this.")
    exit_duration_in_mins: float | None = setting(None, "Stop (with a checkpoint) after this many minutes.")
    calculate_per_token_loss: bool = setting(
        False,
        "Weigh every token of the global batch alike. Otherwise: the mean over microbatches of each one's masked mean.",
    )
    recompute_granularity: Literal["selective", "full"] | None = setting(
        None,
        "Recompute activations in the backward pass: attention core only (selective), or whole layers (full).",
        shorthands={"--recompute-activations": "selective"},
    )
    recompute_method: Literal["uniform", "block"] | None = setting(
        None, "Full recompute: all layers in groups of --recompute-num-layers, or only the first so many."
    )
    recompute_num_layers: int | None = setting(None, "Group size or number of layers for full recompute.")
    torch_compile: bool = setting(False, "Compile the layers with torch.compile.")
    max_nonfinite_steps: int = setting(10, "Stop after this many skipped steps in a row: non-finite ones, and spikes.")
    check_for_spiky_loss: bool = setting(False, "Skip steps whose loss, of any exit, is a spike.")
    check_for_large_grads: bool = setting(False, "Skip steps whose gradient norm is a spike.")
    spike_factor: float = setting(10.0, "A spike: above this many times the mean of the last 100 steps.")
    check_for_nan_in_loss_and_grad: bool = setting(
        True,
        "Skip steps whose loss or gradient is not finite, and say where it came from.",
        off="--no-check-for-nan-in-loss-and-grad",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, weight decay, gradient clipping."""

    optimizer: Literal["adam", "sgd"] = setting("adam", "AdamW (decoupled decay) or SGD with momentum.")
    weight_decay: float = setting(0.01, "Weight decay of matrices; biases and norms have none.")
    start_weight_decay: float | None = setting(None, "Weight decay at the start, with an increasing style.")
    end_weight_decay: float | None = setting(None, "Weight decay at the end, with an increasing style.")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = setting(
        "constant", "How weight decay moves from start to end."
    )
    clip_grad: float = setting(1.0, "Global gradient norm is clipped to this; 0 switches clipping off.")
    adam_beta1: float = setting(0.9, "Decay of Adam's first moment.")
    adam_beta2: float = setting(0.999, "Decay of Adam's second moment.")
    adam_eps: float = setting(1e-8, "Added to Adam's denominator.")
    adam_implementation: Literal["torch", "apex"] = setting(
        "torch", "torch's fused AdamW, or the FusedAdam of NVIDIA's apex (optional)."
    )
    sgd_momentum: float = setting(0.9, "Momentum of SGD.")


@dataclass(frozen=True)
class LrConfig:
    """The learning rate over time; lengths count samples inside, iterations or samples in flags."""

    lr: float | None = setting(None, "Peak learning rate.")
    min_lr: float = setting(0.0, "The learning rate never falls below this after warm-up.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = setting(
        "linear", "Shape of the decay."
    )
    lr_decay_iters: int | None = setting(None, "Iterations of decay. Default: --train-iters.")
    lr_decay_samples: int | None = setting(None, "Samples of decay. Default: --train-samples.")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = setting(
        "exponential", "Shape of WSD's final decay."
    )
    lr_wsd_decay_iters: int | None = setting(None, "Iterations of WSD's final decay.")
    lr_wsd_decay_samples: int | None = setting(None, "Samples of WSD's final decay.")
    lr_warmup_fraction: float | None = setting(None, "Warm-up as a share of the decay length.")
    lr_warmup_iters: int = setting(0, "Iterations of linear warm-up.")
    lr_warmup_samples: int = setting(0, "Samples of linear warm-up.")
    lr_warmup_init: float = setting(0.0, "Learning rate at the start of the warm-up.")
    override_opt_param_scheduler: bool = setting(
        False,
        "On resume, the flags of learning rate and weight decay win over the checkpoint's.",
        flag="--override-opt_param-scheduler",
        aliases=("--override-opt-param-scheduler",),
    )
    use_checkpoint_opt_param_scheduler: bool = setting(
        False,
        "On resume, the checkpoint's learning rate and weight decay win over the flags.",
        flag="--use-checkpoint-opt_param-scheduler",
        aliases=("--use-checkpoint-opt-param-scheduler",),
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and loss scaling."""

    fp16: bool = setting(False, "fp16 weights and activations, fp32 master weights, loss scaling.")
    bf16: bool = setting(False, "bf16 weights and activations, fp32 master weights.")
    fp8: Literal["e4m3", "hybrid"] | None = setting(
        None, "Matrix products of the layers in fp8, by Transformer Engine (optional; bf16).", flag="--fp8-format"
    )
    loss_scale: float | None = setting(None, "Static loss scale (fp16). Default: dynamic.")
    initial_loss_scale: float = setting(2.0**32, "First dynamic loss scale.")
    min_loss_scale: float = setting(1.0, "Smallest dynamic loss scale.")
    loss_scale_window: float = setting(1000.0, "Clean steps before the loss scale doubles.")
    hysteresis: int = setting(2, "Overflows before the loss scale halves.")

    @property
    def params_dtype(self) -> str:
        """`float32`, `float16` or `bfloat16`: the dtype of weights and activations."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
