"""The best way to spread a run over devices: every layout is judged roughly, the best of them are simulated. No torch.

Rough: what fits by a count of microbatches in flight, and the slowest rank's work plus the filling of the pipeline.
Simulated: `estimate`, whose numbers decide: tokens a second, of microbatches that go all the way and back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.config.layout import write_layout
from megatron.errors import ConfigError
from megatron.exits.spec import exit_specs
from megatron.model.partition import StageSpec, partition, stages_of
from megatron.planning.balance import Work, balance
from megatron.planning.costs import Clock
from megatron.planning.estimate import Estimate, Setup, estimate, reduction_time, update_time
from megatron.planning.memory import messages, training_state
from megatron.planning.parameters import rank_parameters
from megatron.planning.units import memory as in_words

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "1f1b+fill")
CHUNKS = (2, 3, 4, 5, 8)
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Space:
    """What may be chosen. Empty: what divides. Filling changes what is trained on, so it is there only if asked for."""

    schedules: tuple[str, ...] = ("1f1b", "gpipe", "interleaved", "zb-h1")
    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    micro_batches: tuple[int, ...] = ()
    recompute: tuple[str, ...] = tuple(RECOMPUTE)


@dataclass(frozen=True)
class Found:
    """The best layouts, fastest first, none of which overflows the memory; and how many were judged.

    kinds: the fastest of each schedule and division of layers that fits, else the one that needs least memory.
    """

    best: tuple[Estimate, ...]
    judged: int
    kinds: dict[tuple[str, str], Estimate]


@dataclass(frozen=True, eq=False)
class Rough:
    """A layout and what it will roughly take: seconds a step, bytes of the fullest rank."""

    setup: Setup
    time: float
    memory: float

    @property
    def kind(self) -> tuple[str, str]:
        """Schedule, and how layers are divided into stages."""
        parallel = self.setup.config.parallel
        if parallel.pipeline_model_parallel_size == 1:
            return "no pipeline", "all"
        schedule = "1f1b+fill" if parallel.fill_explicit_bubbles else parallel.pipeline_schedule
        return schedule, "balanced" if parallel.pipeline_model_parallel_layout else "equal"


def search(base: Setup, space: Space, keep: int = 5, tries: int = 24) -> Found:
    """Judge all layouts in `space`, simulate up to `tries` of the most promising, return the `keep` fastest that fit.

    Some of each kind are simulated in any case. Raises ConfigError where none fits, with the one that needs least
    memory, where nothing divides, or without a global batch: steps of several sizes can't be compared.
    """
    if base.config.training.global_batch_size is None:
        raise ConfigError("layouts are compared by steps of the same size: give --global-batch-size")
    rough = list(_without_needless_recompute(base, _families(base, space)))
    if not rough:
        raise ConfigError(
            f"no layout of the model fits {base.world_size} devices: tp must divide the heads, the MLP's width and the "
            "devices, pp may not exceed the layers, and the global batch must divide by micro-batch times dp"
        )
    rough.sort(key=lambda one: one.time)
    fitting = [one for one in rough if one.memory <= base.device.memory * 1.05]
    kinds: dict[tuple[str, str], list[Rough]] = {}
    for one in rough:
        kinds.setdefault(one.kind, []).append(one)
    for kind, members in kinds.items():
        kinds[kind] = _promising(members, base)
    promising = dict.fromkeys([*fitting[:tries], *(one for members in kinds.values() for one in members)])
    found = {one: estimate(one.setup) for one in promising}
    best = sorted((judged for judged in found.values() if judged.fits(base.device)), key=_slowness)[:keep]
    if not best:
        raise ConfigError(_nothing_fits(base, min(rough, key=lambda one: one.memory)))
    if base.config.exits.exit_layer_nums:
        best = [_with_planned_heads(base, judged) for judged in best]
    fastest = {kind: _fastest([found[one] for one in members], base) for kind, members in kinds.items()}
    return Found(tuple(sorted(best, key=_slowness)), len(rough), fastest)


def _slowness(judged: Estimate) -> float:
    return 1 / judged.tokens_per_second


def _promising(members: list[Rough], base: Setup, tries: int = 3) -> list[Rough]:
    """Of one kind, sorted by time: a few that should fit, else the one that needs least memory."""
    fitting = [one for one in members if one.memory <= base.device.memory]
    return fitting[:tries] or [min(members, key=lambda one: one.memory)]


def _fastest(members: list[Estimate], base: Setup) -> Estimate:
    """That fits; where none does, the one that needs least memory."""
    fitting = [judged for judged in members if judged.fits(base.device)]
    return min(fitting, key=_slowness) if fitting else min(members, key=lambda judged: judged.memory)


def _with_planned_heads(base: Setup, judged: Estimate) -> Estimate:
    """The same with heads in idle time, where that is faster and fits."""
    if judged.config.parallel.pipeline_model_parallel_size == 1 or judged.config.parallel.fill_explicit_bubbles:
        return judged
    parallel = replace(judged.config.parallel, exit_placement="planned")
    placed = estimate(replace(base, config=replace(judged.config, parallel=parallel)))
    return placed if placed.fits(base.device) and placed.step < judged.step * (1 - 1e-6) else judged


def _nothing_fits(base: Setup, nearest: Rough) -> str:
    judged = estimate(nearest.setup)
    over = judged.memory - base.device.memory
    fullest = max(range(len(judged.ranks)), key=lambda rank: judged.ranks[rank].memory)
    return (
        f"no layout fits: the nearest, {describe(judged)}, takes {in_words(judged.memory)} on pipeline rank "
        f"{fullest}, {in_words(over)} more than the {in_words(base.device.memory)} that {base.device.name} has: "
        "take more devices, a smaller --micro-batch-size, or devices with more memory"
    )


def describe(judged: Estimate) -> str:
    """A layout in a few words."""
    parallel, training = judged.config.parallel, judged.config.training
    chunks = len(judged.ranks[0].stages)
    words = [
        f"tp={parallel.tensor_model_parallel_size} pp={parallel.pipeline_model_parallel_size} dp={judged.dp}",
        schedule_name(judged) + (f" x{chunks}" if chunks > 1 else "") + _fillers(judged),
        f"micro-batch {training.micro_batch_size}",
        f"recompute {training.recompute_granularity or 'none'}",
    ]
    return ", ".join(words)


def _fillers(judged: Estimate) -> str:
    """Of the whole step."""
    parallel = judged.config.parallel
    if not parallel.fill_explicit_bubbles:
        return ""
    warmup, cooldown = parallel.num_fill_warmup_microbatches, parallel.num_fill_cooldown_microbatches
    return f" ({warmup} warm-up and {cooldown} cool-down fillers)"


def schedule_name(judged: Estimate) -> str:
    """As in SCHEDULES."""
    parallel = judged.config.parallel
    if parallel.tune_exit:
        return "exits alone"
    if parallel.fill_explicit_bubbles:
        return "1f1b+fill"
    several = len(judged.ranks[0].stages) > 1
    return "interleaved" if several else parallel.pipeline_schedule


def _families(base: Setup, space: Space) -> Iterator[list[Rough]]:
    """Layouts that share the sizes of a layer: one family for each tp, micro-batch and recompute."""
    config = base.config
    micros = space.micro_batches or MICRO_BATCHES
    for tp in _tensor_sizes(base, space.tp):
        for micro in micros:
            for name in space.recompute:
                training = replace(
                    config.training,
                    micro_batch_size=micro,
                    **{"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
                    | RECOMPUTE[name],
                )
                parallel = replace(
                    config.parallel,
                    tensor_model_parallel_size=tp,
                    sequence_parallel=tp > 1 and config.model.seq_length % tp == 0,
                    pipeline_model_parallel_layout=None,
                    num_layers_per_virtual_pipeline_stage=None,
                    fill_explicit_bubbles=False,
                )
                family = Family(replace(base, config=replace(config, training=training, parallel=parallel)))
                yield list(family.layouts(space))


def _without_needless_recompute(base: Setup, families: Iterator[list[Rough]]) -> Iterator[Rough]:
    """Recompute costs time: of layouts that differ in it alone, those up to the first that fits with room to spare."""
    enough: set[tuple] = set()
    for family in families:
        for one in family:
            config = one.setup.config
            key = (config.parallel, config.training.micro_batch_size)
            if key in enough:
                continue
            yield one
            if one.memory < 0.85 * base.device.memory:
                enough.add(key)


def _tensor_sizes(base: Setup, only: tuple[int, ...]) -> list[int]:
    model = base.config.model
    divided = (model.num_attention_heads, model.num_kv_heads, model.ffn_size, base.rows, base.world_size)
    sizes = only or [2**i for i in range(base.device.per_node.bit_length())]
    return [tp for tp in sizes if tp <= base.device.per_node and not any(size % tp for size in divided)]


@dataclass(frozen=True)
class Family:
    """Layouts of one tensor-parallel size, micro-batch and recompute; `setup` has one pipeline rank."""

    setup: Setup

    @cached_property
    def work(self) -> Work:
        """Of the layers, as `balance` takes it."""
        setup, sizes = self.setup, self.setup.activations()
        model, exits, training = setup.config.model, setup.config.exits, setup.config.training
        clock = Clock(
            model, setup.rows, sizes.tokens, setup.device, sizes.tp, 1, sizes.sequence_parallel, sizes.elements
        )
        layer = clock.layer().total
        if training.recompute_granularity == "full":
            layer += clock.layer().forward
        if training.recompute_granularity == "selective":
            layer += clock.attention()
        layers, head = [layer] * model.num_layers, clock.exit(exits).total
        for spec in exit_specs(exits):
            layers[spec.layer] += head
        return Work(tuple(layers), clock.embedding(), clock.head().total)

    def layouts(self, space: Space) -> Iterator[Rough]:
        """All numbers of pipeline ranks and chunks, equal and balanced stages, schedules."""
        base, model = self.setup, self.setup.config.model
        tp = base.config.parallel.tensor_model_parallel_size
        for pp in space.pp or range(1, model.num_layers + 1):
            if base.world_size % (tp * pp):
                continue
            batch, unit = base.config.training.global_batch_size, base.config.training.micro_batch_size
            dp = base.world_size // (tp * pp)
            if batch % (unit * dp):
                continue
            for schedule in space.schedules if pp > 1 else ("1f1b",):
                for chunks in CHUNKS if schedule == "interleaved" else (1,):
                    yield from self._splits(pp, schedule, chunks)

    def _splits(self, pp: int, schedule: str, chunks: int) -> Iterator[Rough]:
        model, stages = self.setup.config.model, pp * chunks
        if stages > model.num_layers:
            return
        if schedule == "1f1b+fill" and not self.setup.config.exits.exit_layer_nums:
            return
        divisions = [(model.num_layers // stages,) * stages] if model.num_layers % stages == 0 else []
        divisions.append(balance(self.work, pp, chunks) if pp > 1 else (model.num_layers,))
        rough = [self._rough(pp, schedule, chunks, depths) for depths in dict.fromkeys(divisions)]
        if chunks == 1 < pp and rough[-1].memory > self.setup.device.memory:
            most = self._most_layers(rough[-1].setup, schedule)
            if min(most) >= 1 and sum(most) >= model.num_layers:
                rough.append(self._rough(pp, schedule, chunks, balance(self.work, pp, 1, most)))
        yield from rough

    def _most_layers(self, setup: Setup, schedule: str) -> list[int]:
        """How many layers each stage may have, by its memory, where the exits are as in `setup`."""
        config, sizes = setup.config, setup.activations()
        pp, adam = config.parallel.pipeline_model_parallel_size, config.optimizer.optimizer == "adam"
        stages = stages_of(config.model, config.exits, config.parallel)
        found = []
        for rank, stage in enumerate(stages):
            held = _in_flight(schedule, pp, 1, rank, setup.microbatches)
            needs = []
            for last in (stage.first + 1, stage.first + 2):  # with one layer, with two
                one = replace(stage, last=last)
                parameters = rank_parameters(config.model, config.exits, (one,), setup.rows, sizes.tp)
                state = training_state(
                    parameters, setup.elements, setup.dp, config.parallel.use_distributed_optimizer, adam
                )
                kept = sizes.forward(one, config.training) * held
                needs.append(state.total + kept + _peak(setup, (one,)) + messages(sizes, pp, 1))
            room = setup.device.memory - needs[0]
            found.append(0 if room < 0 else 1 + int(room / (needs[1] - needs[0])))
        return found

    def _rough(self, pp: int, schedule: str, chunks: int, depths: tuple[int, ...]) -> Rough:
        setup = self._placed(pp, schedule, depths)
        count, spans = setup.microbatches, self.work.spans(depths)
        slowest = max(sum(spans[rank::pp]) for rank in range(pp))
        fill = (pp - 1) / pp * sum(spans) / chunks * (1 / 3 if schedule == "zb-h1" else 1)
        stages = partition(depths, exit_specs(setup.config.exits))
        memory = time = 0.0
        for rank in _telling_ranks(stages, pp):
            parameters = rank_parameters(
                setup.config.model, setup.config.exits, stages[rank::pp], setup.rows, setup.activations().tp
            )
            time = max(time, sum(reduction_time(setup, parameters)) + update_time(setup, parameters))
            state = training_state(
                parameters, setup.elements, setup.dp, setup.config.parallel.use_distributed_optimizer,
                setup.config.optimizer.optimizer == "adam",
            )  # fmt: skip
            held = _in_flight(schedule, pp, chunks, rank, count) * self._kept(setup, stages[rank::pp])
            held += _peak(setup, stages[rank::pp]) + messages(setup.activations(), pp, chunks)
            memory = max(memory, state.total + held)
        return Rough(setup, count * slowest + fill + time, memory)

    def _kept(self, setup: Setup, stages: Sequence[StageSpec]) -> float:
        """Of a microbatch on one of a rank's stages, on average."""
        sizes, training = setup.activations(), setup.config.training
        return sum(sizes.forward(stage, training) for stage in stages) / len(stages)

    def _placed(self, pp: int, schedule: str, depths: tuple[int, ...]) -> Setup:
        config, tp = self.setup.config, self.setup.config.parallel.tensor_model_parallel_size
        equal, chunks = len(set(depths)) == 1, len(depths) // pp
        parallel = replace(
            config.parallel,
            pipeline_model_parallel_size=pp,
            pipeline_schedule="1f1b" if schedule == "1f1b+fill" else schedule,
            pipeline_model_parallel_layout=None if equal else write_layout(depths),
            num_layers_per_virtual_pipeline_stage=depths[0] if equal and chunks > 1 else None,
            use_distributed_optimizer=self.setup.world_size > tp * pp,
            fill_explicit_bubbles=schedule == "1f1b+fill",
        )
        return replace(self.setup, config=replace(config, parallel=parallel))


def _peak(setup: Setup, stages: Sequence[StageSpec]) -> float:
    """What heads or a backward need beside what is kept."""
    sizes, config = setup.activations(), setup.config
    heads = [sizes.heads(stage, config.exits) for stage in stages]
    backwards = [sizes.backward(stage, config.training) for stage in stages]
    return max(max(peak, left + after) for (peak, left), after in zip(heads, backwards, strict=True))


def _telling_ranks(stages: Sequence[StageSpec], pp: int) -> set[int]:
    """The ranks of which one is the fullest: the first two, the last, those with exits."""
    return {0, min(1, pp - 1), pp - 1} | {stage.index % pp for stage in stages if stage.exits}


def _in_flight(schedule: str, pp: int, chunks: int, rank: int, microbatches: int) -> int:
    """Most microbatches that a rank holds at a time, each on one of its stages."""
    if schedule == "gpipe":
        return microbatches
    if schedule == "interleaved":
        return min(microbatches * chunks, 2 * (pp - 1 - rank) + (chunks - 1) * pp + 1)
    return min(microbatches, pp if schedule == "zb-h1" else pp - rank)


def nearest_recompute(base: Setup) -> str | None:
    """The cheapest recompute with which the config fits as it is; None where none does."""
    for name, flags in RECOMPUTE.items():
        training = replace(base.config.training, **_NO_RECOMPUTE | flags)
        tried = replace(base, config=replace(base.config, training=training))
        if estimate(tried).fits(base.device):
            return name
    return None


_NO_RECOMPUTE: dict = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
