"""Runs one rank's action list on one stage. The only module of this room that handles tensors."""

from collections.abc import Sequence
from typing import Any, Protocol

from megatron.schedule.actions import Action, Op


class StageLike(Protocol):
    """What the executor asks of a stage; `model.stage.Stage` is one."""

    def forward(self, batch: Any, stream: Any) -> Any:
        """F: activations of a microbatch."""

    def backward_heads(self, activations: Any, batch: Any, objective: Any) -> tuple[Any, Any]:
        """E: loss terms, and gradients for B."""

    def backward(self, gradients: Any) -> None:
        """B."""


def run(
    actions: Sequence[Action],
    stage: StageLike,
    batches: Sequence[Any],
    streams: Sequence[Any],
    objective: Any,
) -> list[Any]:
    """Execute `actions` in order over the step's microbatches; returns their loss terms in microbatch order.

    batches[i] and streams[i] are the data and dropout streams of microbatch i. What a microbatch keeps is dropped
    with its last action.
    """
    activations: dict[int, Any] = {}
    gradients: dict[int, Any] = {}
    terms: dict[int, Any] = {}
    for action in actions:
        m = action.microbatch
        if action.op is Op.FORWARD:
            activations[m] = stage.forward(batches[m], streams[m])
        elif action.op is Op.HEADS:
            terms[m], gradients[m] = stage.backward_heads(activations.pop(m), batches[m], objective)
        else:
            stage.backward(gradients.pop(m))
    return [terms[m] for m in sorted(terms)]
