"""How each loss weighs in a step whose schedule has partial microbatches, read off the schedule. No torch.

A microbatch is complete on stage k if it runs forward to the end and backward from there to k; a filler ends above the
last stage and goes backward from there. With N_k microbatches complete on stage k, f_k fillers on it, and c = 1/N_0:

- a complete microbatch's losses on stage k weigh 1/N_k, and the gradient that stage k receives for it is multiplied by
  N_(k+1)/N_k, so that at stage k every loss from above weighs 1/N_k too;
- a filler's losses weigh c, and its gradients are not rescaled;
- every exit loss on stage k, of either kind, is further multiplied by 1/(1 + c f_k).

Each loss then weighs 1 in sum on every stage that it reaches: over the choice of which microbatches are partial, the
expected gradient is that of the full batch. Without partial microbatches every loss weighs 1/M and nothing is rescaled.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.schedule.actions import Flow, Op, Schedule, ScheduleError

Normalization = Literal["unbiased", "original"]


@dataclass(frozen=True)
class Terms:
    """The factors of a step. They multiply beside the exits' own weights and the loss scale.

    complete, fillers: N_k and f_k by stage. warmup: the microbatches that are fillers.
    """

    num_microbatches: int
    complete: tuple[int, ...]
    fillers: tuple[int, ...]
    warmup: frozenset[int]
    normalization: Normalization = "unbiased"

    @property
    def cooldown(self) -> int:
        """How many microbatches are fillers of the cool-down: complete on the last stage, but not on the first."""
        return self.complete[-1] - self.complete[0]

    def exit_factor(self, stage: int, microbatch: int) -> float:
        """What an exit loss of `microbatch` on `stage` is multiplied by."""
        if self.normalization == "original":
            return self._original
        c = 1 / self.complete[0]
        share = c if microbatch in self.warmup else 1 / self.complete[stage]
        return share / (1 + c * self.fillers[stage])

    @property
    def final_factor(self) -> float:
        """What the final loss of a microbatch is multiplied by."""
        return self._original if self.normalization == "original" else 1 / self.complete[-1]

    def gradient_factor(self, stage: int, microbatch: int) -> float:
        """What the gradient that `stage` receives for `microbatch` from the stage above is multiplied by."""
        if self.normalization == "original" or microbatch in self.warmup:
            return 1.0
        return self.complete[stage + 1] / self.complete[stage]

    def heads_run(self, stage: int) -> int:
        """For how many microbatches the heads of `stage` run: the denominator of logged mean losses."""
        return self.complete[stage] + self.fillers[stage]

    @property
    def _original(self) -> float:
        """EE-LLM's own: everything is divided by the microbatches that reach the last stage, nothing is rescaled."""
        return 1 / (self.num_microbatches - len(self.warmup))


def derive_terms(schedule: Schedule, normalization: Normalization = "unbiased") -> Terms:
    """The factors for a valid schedule, generated or written by hand.

    Raises ScheduleError where no microbatch is complete on all stages.
    """
    flow = Flow.of(schedule)
    stages, m = schedule.num_stages, schedule.num_microbatches
    dropped = {(a.stage, a.microbatch) for rank in schedule for a in rank if a.op is Op.DROP}
    warmup = frozenset(i for i in range(m) if (stages - 1, i) not in flow.forwards)
    kept = flow.forwards - dropped
    complete = tuple(sum((s, i) in kept for i in range(m) if i not in warmup) for s in range(stages))
    if not m or not complete[0]:
        raise ScheduleError("no microbatch goes through all stages and back: a step needs one that is not a filler")
    fillers = tuple(sum((s, i) in kept for i in warmup) for s in range(stages))
    return Terms(m, complete, fillers, warmup, normalization)
