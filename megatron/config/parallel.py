"""How a run is spread over processes. Frozen values, no torch."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.setting import setting


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes and the process-group backend."""

    tensor_model_parallel_size: int = setting(1, "Ranks that share each layer (tp).")
    pipeline_model_parallel_size: int = setting(1, "Ranks that the layers are spread over (pp).")
    use_distributed_optimizer: bool = setting(
        False, "Each data-parallel rank keeps the optimizer state of its share of every parameter (ZeRO-1)."
    )
    sequence_parallel: bool = setting(False, "Shard activations along the sequence between tp regions (tp > 1).")
    distributed_backend: Literal["nccl", "gloo"] | None = setting(
        None, "Process-group backend. Default: nccl with a GPU, gloo without."
    )
    distributed_timeout_minutes: float = setting(10.0, "How long a rank waits for the others before the run ends.")
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1"] = setting(
        "1f1b", "Order of forwards and backwards. interleaved needs --num-layers-per-virtual-pipeline-stage."
    )
    exit_placement: Literal["before-backward", "planned"] = setting(
        "before-backward", "When exit heads run: just before their microbatch's backward, or where their stage waits."
    )
    schedule_file: str | None = setting(
        None, "A step's actions, a line a pipeline rank, instead of a generated schedule.", metavar="FILE"
    )
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "Layers per stage where each rank has several stages; turns 1f1b into interleaved."
    )
    pipeline_model_parallel_layout: str | None = setting(
        None, "Stages of unequal depth: E, t (a layer) and L (the head) with | between stages, as Et*3|t*5|t*4L."
    )
    fill_explicit_bubbles: bool = setting(
        False, "Use idle time of 1f1b for partial microbatches that only train exits (EE-LLM; pp > 1)."
    )
    num_fill_warmup_microbatches: int | None = setting(
        None, "Partial microbatches in the warm-up of a step. Default: as many as cost no time, by simulation."
    )
    num_fill_cooldown_microbatches: int | None = setting(
        None, "Partial microbatches in the cool-down of a step. Default: as above."
    )
    backward_forward_ratio: float = setting(2.0, "Time of a backward pass over that of a forward pass, for filling.")
    fill_loss_normalization: Literal["unbiased", "original"] = setting(
        "unbiased", "With partial microbatches: every loss an unbiased mean, or EE-LLM's one divisor for all."
    )
