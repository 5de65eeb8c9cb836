"""Which pipeline stage owns which layers and exits, and which rank which stages. The single source of ownership; no
torch.
"""

from dataclasses import dataclass

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError
from megatron.exits.spec import FINAL, ExitSpec, exit_specs


@dataclass(frozen=True)
class StageSpec:
    """A span of layers [first, last) of the model (from 0) plus the exits inside it."""

    index: int
    first: int
    last: int
    exits: tuple[ExitSpec, ...]
    is_first: bool
    is_last: bool

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels of the heads here, shallow first, the final head last."""
        return (*(spec.label for spec in self.exits), *((FINAL,) if self.is_last else ()))


def partition(num_layers: int, exits: tuple[ExitSpec, ...], num_stages: int) -> tuple[StageSpec, ...]:
    """Cut the layers into equal stages; an exit belongs to the stage of the layer it taps.

    Raises ConfigError where layers don't divide or an exit lies outside the model.
    """
    if num_layers % num_stages:
        raise ConfigError(f"--num-layers {num_layers} does not divide into {num_stages} pipeline stages of equal depth")
    for spec in exits:
        if not 0 <= spec.layer < num_layers:
            raise ConfigError(f"--exit-layer-nums: exit {spec.label} is not a layer of 1..{num_layers}")
    depth = num_layers // num_stages
    return tuple(
        StageSpec(
            index,
            index * depth,
            (index + 1) * depth,
            tuple(spec for spec in exits if index * depth <= spec.layer < (index + 1) * depth),
            index == 0,
            index == num_stages - 1,
        )
        for index in range(num_stages)
    )


def count_stages(config: ParallelConfig, num_layers: int) -> int:
    """Pipeline stages of a model: one a rank, or those of --num-layers-per-virtual-pipeline-stage layers."""
    depth = config.num_layers_per_virtual_pipeline_stage
    return num_layers // depth if depth else config.pipeline_model_parallel_size


def stages_of_rank(stages: tuple[StageSpec, ...], rank: int, num_ranks: int) -> tuple[StageSpec, ...]:
    """The stages of a pipeline rank: every num_ranks-th, as interleaved schedules place them."""
    return stages[rank::num_ranks]


@dataclass(frozen=True)
class Replicas:
    """Pipeline ranks that hold a copy of a module, the owner first; its gradients are summed over them."""

    word: tuple[int, ...]
    final_norm: tuple[int, ...]


def replicas(model: ModelConfig, exits: ExitConfig, num_stages: int, num_ranks: int) -> Replicas:
    """Who needs the word embedding (for input, tied heads) and the final norm (for the last head, exits that share it).

    The owner of the word embedding is the first rank, that of the final norm the last stage's.
    """
    stages = partition(model.num_layers, exit_specs(exits), num_stages)
    last = (num_stages - 1) % num_ranks
    with_exits = {stage.index % num_ranks for stage in stages if stage.exits}
    tied_head = set() if model.untie_embeddings_and_output_weights else {last}
    tied_exits = set() if exits.untie_exit_output_weights else with_exits
    sharing = with_exits if exits.exit_norm == "final" else set()
    return Replicas(
        word=(0, *sorted((tied_head | tied_exits) - {0})),
        final_norm=(last, *sorted(sharing - {last})),
    )
