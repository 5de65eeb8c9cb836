"""What a step of a run will take: time, idle share and memory of every pipeline rank, from its config alone. No torch.

Long steps are simulated with fewer microbatches: once the pipeline is full, p more of them always take the same time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.model.partition import StageSpec, replicas, stages_of
from megatron.planning.activations import Activations
from megatron.planning.costs import stage_costs
from megatron.planning.device import Device
from megatron.planning.memory import BUCKET, GRADIENT, State, messages, training_state, with_memory
from megatron.planning.parameters import Parameters, rank_parameters
from megatron.planning.schedules import make_schedule
from megatron.schedule.actions import Pipeline, Schedule
from megatron.schedule.simulate import Costs, Timeline, simulate
from megatron.schedule.terms import derive_terms

LONG = 12_000  # actions; longer steps are simulated in part
UPDATE_BYTES = 44  # that an update moves per parameter: zeroing, norm, clipping, weights and moments
ROUNDING_BYTES = 6  # and from fp32 masters into 16-bit weights


@dataclass(frozen=True)
class RankEstimate:
    """One pipeline rank: its stages, what it holds in bytes, and the share of the pass that it idles."""

    stages: tuple[StageSpec, ...]
    parameters: Parameters
    state: State
    activations: float
    heads_peak: float
    idle: float

    @property
    def memory(self) -> float:
        """Most bytes at a time."""
        return self.state.total + max(self.activations, self.state.exchange)


@dataclass(frozen=True)
class Estimate:
    """A step. Times in seconds. timeline: of the pass, of fewer microbatches where it is long (`shown` of them).

    config: as asked for, with the numbers of fillers that the whole step has.
    """

    config: RunConfig
    dp: int
    microbatches: int
    ranks: tuple[RankEstimate, ...]
    forward_backward: float
    reduction: float
    update: float
    timeline: Timeline
    shown: int

    @property
    def step(self) -> float:
        """All of it, one after the other."""
        return self.forward_backward + self.reduction + self.update

    @property
    def fillers(self) -> int:
        """Microbatches of the step that are partial: not forward and back on all stages."""
        parallel = self.config.parallel
        if not parallel.fill_explicit_bubbles:
            return 0
        return parallel.num_fill_warmup_microbatches + parallel.num_fill_cooldown_microbatches

    @property
    def tokens(self) -> int:
        """Of a step, on all devices; those of fillers as well."""
        return self.microbatches * self._tokens

    @property
    def tokens_per_second(self) -> float:
        """By which layouts are compared: of microbatches that go all the way and back, not of fillers."""
        return (self.microbatches - self.fillers) * self._tokens / self.step

    @property
    def _tokens(self) -> int:
        """Of one microbatch on all data-parallel ranks."""
        return self.dp * self.config.training.micro_batch_size * self.config.model.seq_length

    @property
    def memory(self) -> float:
        """Of the fullest rank."""
        return max(rank.memory for rank in self.ranks)

    @property
    def idle(self) -> float:
        """The mean over ranks of the share of the pass that they wait."""
        return sum(rank.idle for rank in self.ranks) / len(self.ranks)

    def fits(self, device: Device) -> bool:
        """Whether every rank's memory is enough."""
        return self.memory <= device.memory


@dataclass(frozen=True)
class Setup:
    """A config on so many devices: sizes that follow from both. rows: of vocabulary matrices, padded."""

    config: RunConfig
    world_size: int
    rows: int
    device: Device

    @property
    def dp(self) -> int:
        """Data-parallel ranks. Raises ConfigError where the devices don't divide."""
        parallel = self.config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_ranks
        if self.world_size % (tp * pp):
            raise ConfigError(
                f"{self.world_size} devices don't divide by tp={tp} times pp={pp}: change "
                "--tensor-model-parallel-size, --pipeline-model-parallel-size or the number of devices"
            )
        return self.world_size // (tp * pp)

    @property
    def microbatches(self) -> int:
        """Of a step, on each data-parallel rank. Raises ConfigError where the batch doesn't divide."""
        training, unit = self.config.training, self.config.training.micro_batch_size * self.dp
        batch = training.global_batch_size or unit
        if batch % unit:
            raise ConfigError(
                f"--global-batch-size {batch} does not divide by --micro-batch-size {training.micro_batch_size} times "
                f"{self.dp} data-parallel ranks: change one of them"
            )
        return batch // unit

    @property
    def elements(self) -> int:
        """Bytes of a weight."""
        return 4 if self.config.precision.params_dtype == "float32" else 2

    def learning(self, parameters: Parameters) -> int:
        """How many of a rank's parameters are trained."""
        return parameters.trained(self.config.parallel.tune_exit)

    def activations(self) -> Activations:
        """Sizes of one microbatch's tensors."""
        config, parallel = self.config, self.config.parallel
        tp, micro = parallel.tensor_model_parallel_size, config.training.micro_batch_size
        kind = "cpu" if self.device.kind == "cpu" else "cuda"
        cut = parallel.sequence_parallel and tp > 1
        return Activations(config.model, self.rows, micro, tp, cut, self.elements, kind)

    def costs(self, stages: Sequence[StageSpec]) -> tuple[Costs, ...]:
        """Times and memory of the stages."""
        config, sizes = self.config, self.activations()
        costs = stage_costs(
            config.model,
            config.exits,
            stages,
            self.rows,
            sizes.tokens,
            self.device,
            tp=sizes.tp,
            dp=self.dp,
            sequence_parallel=sizes.sequence_parallel,
            training=config.training,
            element_bytes=self.elements,
        )
        return with_memory(costs, sizes, config.exits, stages, config.training)


def estimate(setup: Setup) -> Estimate:
    """Predict a step.

    Raises ConfigError or ScheduleError for what can't be run.
    """
    setup = _with_fillers(setup)
    config, p = setup.config, setup.config.parallel.pipeline_ranks
    stages = stages_of(config.model, config.exits, config.parallel)
    costs, count = setup.costs(stages), setup.microbatches

    def run(microbatches: int) -> Timeline:
        return timeline_of(setup, microbatches)

    makespan, peaks, timeline, shown = _extrapolated(run, count, p, 3 * len(stages))
    busy = [timeline.busy(rank) + (count - shown) * sum(_work(cost) for cost in costs[rank::p]) for rank in range(p)]
    waiting = messages(setup.activations(), p, len(stages) // p)
    ranks = []
    for rank in range(p):
        mine = stages[rank::p]
        parameters = rank_parameters(config.model, config.exits, mine, setup.rows, setup.activations().tp)
        sharded, adam = config.parallel.use_distributed_optimizer, config.optimizer.optimizer == "adam"
        ranks.append(
            RankEstimate(
                stages=mine,
                parameters=parameters,
                state=training_state(parameters, setup.elements, setup.dp, sharded, adam, config.parallel.tune_exit),
                activations=peaks[rank] + waiting,
                heads_peak=max(cost.heads_peak for cost in costs[rank::p]),
                idle=1 - busy[rank] / makespan,
            )
        )
    return Estimate(
        config=config,
        dp=setup.dp,
        microbatches=count,
        ranks=tuple(ranks),
        forward_backward=makespan,
        reduction=max(_visible(setup, one.parameters, costs[rank::p]) for rank, one in enumerate(ranks))
        + copies_time(setup, stages),
        update=max(update_time(setup, rank.parameters) for rank in ranks),
        timeline=timeline,
        shown=shown,
    )


def timeline_of(setup: Setup, microbatches: int) -> Timeline:
    """The pass over so many of the step's microbatches, simulated."""
    return simulate(*_schedule(setup, microbatches))


def _schedule(setup: Setup, microbatches: int) -> tuple[Schedule, tuple[Costs, ...]]:
    config, p = setup.config, setup.config.parallel.pipeline_ranks
    stages = stages_of(config.model, config.exits, config.parallel)
    costs, heads = setup.costs(stages), frozenset(stage.index for stage in stages if stage.heads)
    pipeline = Pipeline(p, microbatches, heads, len(stages) // p, config.parallel.tune_exit)
    return make_schedule(config.parallel, pipeline, costs), costs


def _with_fillers(setup: Setup) -> Setup:
    """With the numbers of fillers that the whole step has, so that a part of it is simulated with the same.

    Of long steps they are read off a part: with and without fillers, p more microbatches take the same time.
    """
    parallel, count = setup.config.parallel, setup.microbatches
    if not parallel.fill_explicit_bubbles:
        return setup
    p = parallel.pipeline_ranks
    simulated = count if _is_short(count, p, 3 * p) else _few(count, p)
    terms = derive_terms(_schedule(setup, simulated)[0])
    settled = replace(
        parallel, num_fill_warmup_microbatches=len(terms.warmup), num_fill_cooldown_microbatches=terms.cooldown
    )
    return replace(setup, config=replace(setup.config, parallel=settled))


def _few(count: int, p: int) -> int:
    """Microbatches by which a step of `count` is simulated where it is long."""
    return 4 * p + count % p


def _is_short(count: int, p: int, actions: int) -> bool:
    """Whether all microbatches are simulated; actions: of one."""
    return count <= _few(count, p) or count * actions <= LONG


def _extrapolated(
    run: Callable[[int], Timeline], count: int, p: int, actions: int
) -> tuple[float, tuple[float, ...], Timeline, int]:
    """Time and peaks of `count` microbatches: simulated, or where that is long from two steps that are p apart."""
    few = _few(count, p)
    if _is_short(count, p, actions):
        timeline = run(count)
        return timeline.makespan, timeline.peak_memory, timeline, count
    before, timeline = run(few - p), run(few)
    periods = (count - few) / p
    makespan = timeline.makespan + periods * (timeline.makespan - before.makespan)
    pairs = zip(timeline.peak_memory, before.peak_memory, strict=True)
    return makespan, tuple(now + periods * (now - then) for now, then in pairs), timeline, few


def reduction_time(setup: Setup, parameters: Parameters) -> tuple[float, float]:
    """Sums of gradients over the data-parallel ranks, and with ZeRO-1 the weights' way back."""
    dp, tp = setup.dp, setup.config.parallel.tensor_model_parallel_size
    if dp == 1:
        return 0.0, 0.0
    once = setup.learning(parameters) * (dp - 1) / dp / setup.device.link("dp", tp * dp)
    if setup.config.parallel.use_distributed_optimizer:
        return once * GRADIENT, once * setup.elements
    return 2 * once * GRADIENT, 0.0


def _visible(setup: Setup, parameters: Parameters, costs: Sequence[Costs]) -> float:
    """What the last backward passes of a rank's stages don't hide: buckets leave as they are made, the last at the end.

    A split backward makes its gradients at the end.
    """
    there, back = reduction_time(setup, parameters)
    split = setup.config.parallel.pipeline_schedule == "zb-h1"
    hidden = 0.0 if split else sum(cost.input + cost.weight for cost in costs)
    last = there * min(1.0, BUCKET / max(setup.learning(parameters), 1))
    return max(there - hidden, last) + back


def copies_time(setup: Setup, stages: tuple[StageSpec, ...]) -> float:
    """Sums over the pipeline ranks that hold copies of the word embedding."""
    parallel, model = setup.config.parallel, setup.config.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_ranks
    holders = len(replicas(model, setup.config.exits, stages, pp).word)
    if holders == 1 or parallel.tune_exit:
        return 0.0
    share = setup.dp if parallel.use_distributed_optimizer else 1
    size = setup.rows // tp * model.hidden_size * GRADIENT / share
    return 2 * size * (holders - 1) / holders / setup.device.link("pp", setup.world_size)


def update_time(setup: Setup, parameters: Parameters) -> float:
    """The optimizer's: bound by memory."""
    share = setup.dp if setup.config.parallel.use_distributed_optimizer else 1
    moved = UPDATE_BYTES + (ROUNDING_BYTES if setup.elements < 4 else 0)
    return setup.learning(parameters) * moved / share / setup.device.memory_bandwidth


def _work(cost: Costs) -> float:
    return cost.forward + cost.heads + cost.input + cost.weight
