"""A training run's parts as one value, and how far it is. Built by `train.build`, used by `step` and `loop`."""

from dataclasses import dataclass, field

from megatron.checkpoint.together import Together
from megatron.config.run import RunConfig
from megatron.model.gpt import GPT
from megatron.model.partition import StageSpec
from megatron.model.stage import Stage
from megatron.optim.gradient_sync import Shared
from megatron.optim.lr import LrSchedule, WeightDecaySchedule
from megatron.optim.optimizer import TrainingOptimizer
from megatron.optim.scaler import LossScaler
from megatron.parallel.mesh import Mesh
from megatron.parallel.p2p import PipelineLink
from megatron.parallel.rng import DropoutStream
from megatron.schedule.actions import Pipeline
from megatron.schedule.execute import Plan
from megatron.schedule.simulate import Costs
from megatron.tokenizer.base import Tokenizer
from megatron.train.plan import Buckets, step_plan
from megatron.train.spikes import SpikeWatch


@dataclass
class Progress:
    """How far a run is. `optimizer_samples` lags behind `consumed_samples` by skipped steps.

    run: how often the run was started; metrics lines carry it. good: iteration of the newest checkpoint whose weights
    are known to give finite losses (0: none).
    """

    iteration: int = 0
    consumed_samples: int = 0
    optimizer_samples: int = 0
    skipped_steps: int = 0
    run: int = 0
    good: int = 0


@dataclass
class Trainer:
    """Everything a step needs. `vocab_size` counts true ids; the model's matrices may be padded beyond it.

    partition: all stages of the model; costs: theirs for a microbatch, in FLOPs; stages: this rank's by index; link: to
    the other pipeline ranks, if any. shared: what of the parameters other ranks have, too. together: all ranks, as
    writers of checkpoints; peers: all ranks, for anything else. optimizer: None where the run only evaluates.
    """

    config: RunConfig
    mesh: Mesh
    tokenizer: Tokenizer
    vocab_size: int
    model: GPT
    partition: tuple[StageSpec, ...]
    costs: tuple[Costs, ...]
    stages: dict[int, Stage]
    link: PipelineLink | None
    shared: Shared
    together: Together
    peers: Together
    optimizer: TrainingOptimizer | None
    scaler: LossScaler
    lr: LrSchedule
    weight_decay: WeightDecaySchedule
    spikes: SpikeWatch
    progress: Progress = field(default_factory=Progress)

    @property
    def uses_dropout(self) -> bool:
        """Whether the forward pass draws random numbers."""
        return self.config.model.hidden_dropout > 0 or self.config.model.attention_dropout > 0

    @property
    def buckets(self) -> Buckets:
        """Gradients that this rank sums over data-parallel ranks, as numbers of buckets."""
        counts = (self.optimizer.sync.count_buckets(heads_only) for heads_only in (False, True))
        layers, heads = (tuple(sorted(count.items())) for count in counts)
        return layers, heads

    def plan(self, num_microbatches: int) -> Plan:
        """The schedule of a step. Raises ScheduleError where the flags can't be met."""
        return step_plan(self.config.parallel, self.pipeline(num_microbatches), self.costs, self.buckets)

    def pipeline(self, num_microbatches: int) -> Pipeline:
        """What a step's schedule is asked for."""
        heads = frozenset(stage.index for stage in self.partition if stage.heads)
        ranks = self.mesh.size("pp")
        return Pipeline(ranks, num_microbatches, heads, chunks=len(self.partition) // ranks)

    def dropout_stream(self, step: int, microbatch: int) -> DropoutStream | None:
        """The dropout streams of one of this rank's microbatches of a step, or None where nothing is dropped."""
        if not self.uses_dropout:
            return None
        number = microbatch * self.mesh.size("dp") + self.mesh.rank("dp")
        return DropoutStream(self.config.training.seed, step, number, self.mesh.rank("tp"))
