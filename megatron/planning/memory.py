"""What a rank holds while it trains: weights, gradients, optimizer state, and activations at their peak. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.config.model import ExitConfig
from megatron.config.training import TrainingConfig
from megatron.model.partition import StageSpec
from megatron.planning.activations import Activations
from megatron.planning.parameters import Parameters
from megatron.schedule.simulate import Costs

GRADIENT = 4  # bytes of an element: sums are fp32
BUCKET, UNDER_WAY = 1 << 23, 3  # elements that ranks exchange together, and how many such; as in optim.buckets


@dataclass(frozen=True)
class State:
    """Bytes that a rank always holds. exchange: what sums over ranks take for a moment, after the backward."""

    weights: int
    gradients: int
    optimizer: int
    exchange: int

    @property
    def total(self) -> int:
        """What is held during forward and backward."""
        return self.weights + self.gradients + self.optimizer


def training_state(
    parameters: Parameters, elements: int, dp: int, sharded: bool, adam: bool = True, tuning: bool = False
) -> State:
    """elements: bytes of a weight. sharded: the optimizer's state is spread over the data-parallel ranks (ZeRO-1).
    tuning: exits alone learn.

    Weights of 16 bits have fp32 masters; the moments are fp32: two of Adam, one of SGD.
    """
    count = parameters.trained(tuning)
    own = -(-count // dp) if sharded else count
    masters = 4 if elements < 4 else 0
    exchange = 0
    if dp > 1:
        exchange = int(min(UNDER_WAY * BUCKET, count) * GRADIENT * (1 + 1 / dp if sharded else 1))
    return State(parameters.total * elements, count * GRADIENT, own * (masters + (8 if adam else 4)), exchange)


def with_memory(
    costs: Sequence[Costs],
    activations: Activations,
    exits: ExitConfig,
    stages: Sequence[StageSpec],
    training: TrainingConfig,
) -> tuple[Costs, ...]:
    """The stages' costs with their memory beside the times."""
    found = []
    for cost, stage in zip(costs, stages, strict=True):
        peak, left = activations.heads(stage, exits)
        found.append(
            replace(
                cost,
                kept=activations.forward(stage, training),
                heads_peak=peak,
                heads_kept=left,
                backward_peak=activations.backward(stage, training),
            )
        )
    return tuple(found)


def messages(activations: Activations, pp: int, chunks: int) -> int:
    """Hidden states and gradients that are on their way: a stage has one of each posted ahead."""
    return 0 if pp == 1 else 2 * activations.hidden * chunks
