"""A whole run as one frozen value: what `--help` lists, a checkpoint stores, and `build` reads."""

from dataclasses import dataclass, field
from typing import Literal

from megatron.config.data import DataConfig, TokenizerConfig
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.setting import setting
from megatron.config.training import LrConfig, OptimizerConfig, PrecisionConfig, TrainingConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    save: str | None = setting(None, "Directory that checkpoints are written to.", metavar="DIR")
    save_interval: int | None = setting(None, "Iterations between checkpoints.")
    keep_last_n_checkpoints: int | None = setting(
        None, "Remove older native checkpoints in --save after each save. Default: keep all."
    )
    async_save: bool = setting(
        False, "Write checkpoints while training goes on; takes CPU memory for a copy of the state."
    )
    load: str | None = setting(
        None, "Directory of a checkpoint to start from: native or Megatron's, by content.", metavar="DIR"
    )
    load_iteration: int = setting(0, "Iteration to load; 0: the newest.")
    save_optim: bool = setting(True, "Save the optimizer's state.", off="--no-save-optim")
    load_optim: bool = setting(True, "Load the optimizer's state.", off="--no-load-optim")
    finetune: bool = setting(False, "Load weights only and start at iteration 0.")
    use_checkpoint_args: bool = setting(False, "Take the model's shape from the checkpoint.")
    exit_on_missing_checkpoint: bool = setting(False, "Stop if --load holds no checkpoint, instead of starting fresh.")
    ckpt_format: Literal["native", "megatron"] = setting("native", "Format of saved checkpoints.")


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported, where, how often."""

    dry_run: bool = setting(
        False, "Check the flags, say what the run will take of memory and time and whether it fits, and stop."
    )
    device: str | None = setting(
        None, "Device that --dry-run judges by, as A100-80GB. Default: the GPU found, else that one.", metavar="NAME"
    )
    log_interval: int = setting(100, "Iterations between console lines.")
    metrics_file: str | None = setting(None, "Append one JSON object per iteration to this file.", metavar="FILE")
    trace: str | None = setting(
        None, "Write what each rank did when in the third step, for chrome://tracing, and a .png of it.", metavar="FILE"
    )
    tensorboard_dir: str | None = setting(None, "Write TensorBoard curves here.", metavar="DIR")
    tracker_log_interval: int = setting(
        1, "Iterations between points in TensorBoard and wandb.", aliases=("--tensorboard-log-interval",)
    )
    log_params_norm: bool = setting(False, "Report the norm of all parameters.")
    log_num_zeros_in_grad: bool = setting(False, "Report how many gradient entries are zero.")
    wandb_project: str | None = setting(None, "Weights & Biases project; unset means no wandb.")
    wandb_group: str | None = setting(None, "Weights & Biases group.")
    wandb_exp_name: str = setting("default", "Weights & Biases run name.")
    wandb_save_dir: str | None = setting(None, "Where wandb keeps its files.", metavar="DIR")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs to know, in groups; built by `config.load`, stored in every checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    exits: ExitConfig = field(default_factory=ExitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    learning_rate: LrConfig = field(default_factory=LrConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
