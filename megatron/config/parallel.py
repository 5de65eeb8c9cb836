"""How a run is spread over processes. Frozen values, no torch."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.setting import setting


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes and the process-group backend."""

    tensor_model_parallel_size: int = setting(1, "Ranks that share each layer (tp).")
    pipeline_model_parallel_size: int = setting(1, "Ranks that the layers are spread over (pp).")
    sequence_parallel: bool = setting(False, "Shard activations along the sequence between tp regions (tp > 1).")
    distributed_backend: Literal["nccl", "gloo"] | None = setting(
        None, "Process-group backend. Default: nccl with a GPU, gloo without."
    )
    distributed_timeout_minutes: float = setting(10.0, "How long a rank waits for the others before the run ends.")
    pipeline_schedule: Literal["1f1b", "gpipe"] = setting("1f1b", "Order of forwards and backwards.")
