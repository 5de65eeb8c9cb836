"""What kept a step from being applied, in words that name head, microbatch and rank; or parameter and stage.

Called on every rank once all know that something is wrong; only then is it worth asking who saw it.
"""

import math
from collections.abc import Mapping

from megatron.exits.loss import LossTerms
from megatron.schedule.execute import Key
from megatron.train.losses import Shares
from megatron.train.spikes import loss_name
from megatron.train.trainer import Trainer

_SHOWN = 4


def loss_problem(trainer: Trainer, losses: Shares, terms: Mapping[Key, LossTerms]) -> str | None:
    """Which heads and microbatches have a non-finite loss, and where; None if none has.

    losses: as all ranks know them; terms: this rank's own.
    """
    if all(math.isfinite(value) for values in losses.values() for value in values):
        return None
    mine = [
        f"{loss_name(label)} in microbatch {m}"
        for (_, m), term in sorted(terms.items())
        for label, loss in term.loss.items()
        if trainer.mesh.rank("tp") == 0 and not math.isfinite(float(loss))
    ]
    return _who(trainer, mine, "", " is not finite")


def spike_problem(trainer: Trainer, losses: Shares, terms: Mapping[Key, LossTerms]) -> str | None:
    """The heads whose loss is a spike, and the rank that met the largest loss; None where there is none."""
    problem = trainer.spikes.loss_problem(losses)
    if problem is None:
        return None
    largest = max((float(loss) for term in terms.values() for loss in term.loss.values()), default=-math.inf)
    _, place = max(trainer.peers.gather((largest, trainer.mesh.place())))
    return f"{problem} (rank {place})"


def gradient_problem(trainer: Trainer, norm: float, limit: float | None) -> str:
    """Which parameters' gradients are not finite, or make the gradient norm a spike, and where."""
    optimizer = trainer.optimizer
    if math.isfinite(norm):
        _, name, place = max(trainer.peers.gather((*optimizer.steepest_parameter(), trainer.mesh.place())))
        return f"a spike: gradient norm {norm:.4g}, above {limit:.4g}, mostly of {name} (rank {place})"
    return _who(trainer, optimizer.nonfinite_parameters(), "the gradients of ", " are not finite")


def _who(trainer: Trainer, mine: list[str], before: str, after: str) -> str:
    """The first things that a rank saw, how many others there are, and that rank."""
    found = trainer.peers.gather((trainer.mesh.place(), mine))
    seen = [(place, things) for place, things in found if things]
    place, things = seen[0] if seen else (found[0][0], ["all parameters together"])
    more = f" (and {len(things) - _SHOWN} more)" if len(things) > _SHOWN else ""
    ranks = f", and {len(seen) - 1} other ranks" if len(seen) > 1 else ""
    return f"{before}{', '.join(things[:_SHOWN])}{more}{after} (rank {place}{ranks})"
