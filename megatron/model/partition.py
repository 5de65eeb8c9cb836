"""Which pipeline stage owns which layers and exits, and which rank which stages. The single source of ownership; no
torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from megatron.config.layout import stage_depths
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig
from megatron.errors import ConfigError
from megatron.exits.spec import FINAL, ExitSpec, exit_specs


@dataclass(frozen=True)
class StageSpec:
    """A span of layers [first, last) of the model (from 0) plus the exits inside it.

    stop: where the backbone is frozen, the layer (from 0) that training doesn't run any more; then the model's own head
    doesn't run either.
    """

    index: int
    first: int
    last: int
    exits: tuple[ExitSpec, ...]
    is_first: bool
    is_last: bool
    stop: int | None = None

    @property
    def until(self) -> int:
        """Layers run up to this one."""
        return self.last if self.stop is None else self.stop

    @property
    def has_final(self) -> bool:
        """Whether the model's own head runs here."""
        return self.is_last and self.stop is None

    @property
    def whole(self) -> "StageSpec":
        """The same with all that it holds being run."""
        return replace(self, stop=None)

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels of the heads here, shallow first, the final head last."""
        return (*(spec.label for spec in self.exits), *((FINAL,) if self.has_final else ()))


def partition(depths: Sequence[int], exits: Sequence[ExitSpec]) -> tuple[StageSpec, ...]:
    """Stages of so many layers each; an exit belongs to the stage of the layer it taps.

    Raises ConfigError where an exit lies outside the model.
    """
    borders = (0, *accumulate(depths))
    for spec in exits:
        if not 0 <= spec.layer < borders[-1]:
            raise ConfigError(f"--exit-layer-nums: exit {spec.label} is not a layer of 1..{borders[-1]}")
    return tuple(
        StageSpec(
            index,
            first,
            last,
            tuple(spec for spec in exits if first <= spec.layer < last),
            index == 0,
            index == len(depths) - 1,
        )
        for index, (first, last) in enumerate(pairwise(borders))
    )


def stages_of(model: ModelConfig, exits: ExitConfig, parallel: ParallelConfig) -> tuple[StageSpec, ...]:
    """All stages that a run has: the model's, or the first ones with what the exits to be tuned need.

    Raises ConfigError where the flags can't be met.
    """
    stages = partition(stage_depths(parallel, model.num_layers), exit_specs(exits))
    return _tuned(stages[: parallel.pipeline_ranks]) if parallel.tune_exit else stages


def _tuned(loaded: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
    """Stages that run as far as the last exit."""
    specs = [spec for stage in loaded for spec in stage.exits]
    if not specs:
        raise ConfigError(
            f"--tune-exit: no exit lies in the first {len(loaded)} pipeline stages, which end at layer "
            f"{loaded[-1].last}: raise --tune-exit-pipeline-parallel-size, or give earlier --exit-layer-nums"
        )
    end = max(spec.layer if spec.tap == "input" else spec.layer + 1 for spec in specs)
    return tuple(replace(stage, stop=min(max(end, stage.first), stage.last)) for stage in loaded)


def stages_of_rank(stages: tuple[StageSpec, ...], rank: int, num_ranks: int) -> tuple[StageSpec, ...]:
    """The stages of a pipeline rank: every num_ranks-th, as interleaved schedules place them."""
    return stages[rank::num_ranks]


def segments(stage: StageSpec, training: TrainingConfig) -> tuple[tuple[int, int, bool], ...]:
    """(first, last, recompute) spans of the stage's layers under the run's recompute flags."""
    if training.recompute_granularity != "full":
        return ((stage.first, stage.until, False),)
    size = training.recompute_num_layers or 1
    if training.recompute_method == "block":
        border = min(stage.first + size, stage.until)
        recomputed = tuple((i, i + 1, True) for i in range(stage.first, border))
        return (*recomputed, (border, stage.until, False)) if border < stage.until else recomputed
    return tuple((i, min(i + size, stage.until), True) for i in range(stage.first, stage.until, size))


@dataclass(frozen=True)
class Replicas:
    """Pipeline ranks that hold a copy of a module, the owner first; its gradients are summed over them."""

    word: tuple[int, ...]
    final_norm: tuple[int, ...]


def replicas(model: ModelConfig, exits: ExitConfig, stages: tuple[StageSpec, ...], num_ranks: int) -> Replicas:
    """Who needs the word embedding (for input, tied heads) and the final norm (for the last head, exits that share it).

    The owner of the word embedding is the first rank, that of the final norm the last stage's.
    """
    last = (len(stages) - 1) % num_ranks
    with_exits = {stage.index % num_ranks for stage in stages if stage.exits}
    tied_head = set() if model.untie_embeddings_and_output_weights else {last}
    tied_exits = set() if exits.untie_exit_output_weights else with_exits
    sharing = with_exits if exits.exit_norm == "final" else set()
    return Replicas(
        word=(0, *sorted((tied_head | tied_exits) - {0})),
        final_norm=(last, *sorted(sharing - {last})),
    )
