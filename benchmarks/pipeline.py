"""What exits cost in a pipeline: every schedule with and without them, and EE-LLM's four models.

Actions are timed in one process, on all stages of a small model; the simulator then runs every schedule for 2 to 16
pipeline ranks with those times. The rows of 1.3B to 30B take times from FLOPs, on A100s. Two processes confirm that
what runs is what was planned; their wall clock is given without a goal, since they share the cores.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from report import Figure, arguments, finish

from megatron.config.layout import write_layout
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.training import PrecisionConfig, TrainingConfig
from megatron.exits.loss import Objective, Share
from megatron.exits.spec import FINAL
from megatron.model.stage import Stage
from megatron.nn.linear import defer_weight_gradients
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh
from megatron.planning.balance import Work, balance
from megatron.planning.device import preset
from megatron.planning.estimate import Setup, estimate
from megatron.planning.flops import training_flops_per_token
from megatron.planning.search import Family
from megatron.schedule.actions import Action, Op, Pipeline, Schedule
from megatron.schedule.execute import Plan, Step, run
from megatron.schedule.generate import gpipe, interleaved, one_f_one_b, zero_bubble_h1
from megatron.schedule.place import best_fill, place_heads
from megatron.schedule.simulate import Costs, Timeline, simulate
from megatron.schedule.trace import Recorder, measured_costs
from megatron.testing.layouts import VOCAB, build, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import build_gpt, random_batch
from megatron.train.step import train_step

LAYERS, ROWS = 16, 2048
EXITS = (5, 9)  # before the first layer of the second and the third quarter


@dataclass(frozen=True)
class Row:
    """One of EE-LLM's models, with the sizes of its launch scripts, on four data-parallel ranks."""

    name: str
    layers: int
    hidden: int
    heads: int
    tp: int
    micro: int
    exits: tuple[int, int]
    overhead: float  # percent that exits add at pp = 4, by arithmetic from those scripts
    untied: bool = True


MODELS = (
    Row("1.3B", 24, 2048, 32, 1, 4, (7, 13), 0.26, untied=False),
    Row("7B", 32, 4096, 32, 1, 2, (9, 17), 0.06),
    Row("13B", 40, 5120, 40, 2, 1, (11, 21), 0.02),
    Row("30B", 60, 6656, 52, 4, 1, (16, 31), 0.01),
)


def measure_layers(exits: tuple[int, ...], width: int, rounds: int) -> list[Costs]:
    """Median times of every action, in one process, of a model with a stage for each layer."""
    model = ModelConfig(
        num_layers=LAYERS, hidden_size=width, num_attention_heads=8, seq_length=128, attention_dropout=0.0,
        hidden_dropout=0.0, untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    config = ExitConfig(exit_layer_nums=exits, pre_exit=True, untie_exit_output_weights=True)
    gpt, backend = build_gpt(model, config, ROWS, ROWS, num_stages=LAYERS), Backend.choose("gloo")
    later = defer_weight_gradients(gpt)
    stages = {spec.index: Stage(gpt, ROWS, spec, later) for spec in gpt.stages}
    batches = [random_batch(2, 128, ROWS, seed=m) for m in range(rounds)]
    goal = Objective({**dict.fromkeys(map(str, exits), 0.5), FINAL: 1.0}, {}, frozenset())
    heads = [spec.index for spec in gpt.stages if spec.heads]
    schedule = Schedule.of([_one_after_the_other(rounds, heads)])
    recorder = Recorder(backend.stamp, backend.seconds)
    step = Step(stages, batches, [None] * rounds, goal, lambda stage, m: Share(1.0, 1.0), recorder=recorder)
    run(Plan.of(schedule), 0, step)
    warm = [one for one in recorder.happened() if one.action.microbatch > 1]
    return measured_costs([warm])


def _one_after_the_other(count: int, heads: Sequence[int]) -> list[Action]:
    actions = []
    for m in range(count):
        actions += [Action(stage, Op.FORWARD, m) for stage in range(LAYERS)]
        for stage in reversed(range(LAYERS)):
            actions += [Action(stage, Op.HEADS, m)] if stage in heads else []
            actions += [Action(stage, Op.INPUT, m), Action(stage, Op.WEIGHT, m)]
    return actions


def on_ranks(layers: Sequence[Costs], stages: int) -> list[Costs]:
    """The costs of larger stages; every layer counts one in memory."""
    size = len(layers) // stages
    groups = [layers[i : i + size] for i in range(0, len(layers), size)]
    return [
        Costs(
            forward=sum(c.forward for c in group),
            heads=sum(c.heads for c in group),
            input=sum(c.input for c in group),
            weight=sum(c.weight for c in group),
            kept=float(size),
        )
        for group in groups
    ]


def schedules(p: int, m: int, layers: Sequence[Costs]) -> dict[str, Timeline]:
    """Every schedule of m microbatches on p ranks, simulated."""
    costs, chunks = on_ranks(layers, p), 2 if 2 * p <= LAYERS else 1
    plain = Pipeline(p, m, _heads(costs))
    found = {
        name: simulate(make(plain), costs)
        for name, make in (("gpipe", gpipe), ("1f1b", one_f_one_b), ("zb-h1", zero_bubble_h1))
    }
    found["1f1b, heads in idle slots"] = simulate(place_heads(one_f_one_b(plain), costs), costs)
    found["zb-h1, heads in idle slots"] = simulate(place_heads(zero_bubble_h1(plain), costs), costs)
    if chunks > 1:
        small = on_ranks(layers, chunks * p)
        found["interleaved"] = simulate(interleaved(Pipeline(p, m, _heads(small), chunks)), small)
    return found


def _heads(costs: Sequence[Costs]) -> frozenset[int]:
    return frozenset(stage for stage, cost in enumerate(costs) if cost.heads > 0)


def schedule_figures(width: int, rounds: int) -> list[Figure]:
    """All schedules with measured times: a table, and the figures that have goals."""
    bare, layers = (measure_layers(exits, width, rounds) for exits in ((), EXITS))
    exits = [cost.heads for cost in layers[:-1] if cost.heads > 0]
    _without_noise(bare, layers)
    say(f"{'':36}{'step with exits':>18}{'without':>12}{'idle':>9}{'peak':>8}   (ms; share; layers' activations)")
    figures, placed, split = [], {}, {}
    for p in (2, 4, 8, 16):
        m = 4 * p
        with_exits, without = schedules(p, m, layers), schedules(p, m, bare)
        for name, timeline in with_exits.items():
            times = f"{timeline.makespan * 1e3:>18.1f}{without[name].makespan * 1e3:>12.1f}"
            title = f"p={p} m={m} {name}"
            say(f"{title:36}{times}{timeline.bubble_share:>9.1%}{max(timeline.peak_memory):>8.0f}")
        plain = with_exits["1f1b"].makespan
        placed[p] = with_exits["1f1b, heads in idle slots"].makespan / plain
        split[p] = with_exits["zb-h1"].makespan / plain
        if p == 4:
            added = (plain - without["1f1b"].makespan) / sum(exits)
            name = "p=4 m=16, measured times: time that two exits add to 1f1b / their work for one microbatch"
            figures.append(Figure(name, added, "x", 1.0, False))
    return [
        *figures,
        *largest("measured times: 1f1b, heads in idle slots / before backward", placed, 1.0),
        *largest("measured times: zb-h1 / 1f1b, both with exits", split, 1.0),
        *filling_figures(layers),
    ]


def largest(name: str, ratios: Mapping[int, float], goal: float) -> list[Figure]:
    """Ratios by number of ranks, and the largest with its goal."""
    each = [Figure(f"p={p} m={4 * p}, {name}", ratio, "x") for p, ratio in ratios.items()]
    return [*each, Figure(f"p=2 to 16, {name}: largest", max(ratios.values()), "x", goal, False)]


def _without_noise(bare: list[Costs], layers: list[Costs]) -> None:
    """Both models' layers are alike: the same times for both, so that only the exits make a difference."""
    for op in ("forward", "input", "weight"):
        middle = median(getattr(cost, op) for cost in (*bare, *layers))
        for costs in (bare, layers):
            costs[:] = [replace(cost, **{op: middle}) for cost in costs]
    last = median((bare[-1].heads, layers[-1].heads))
    for costs in (bare, layers):
        costs[-1] = replace(costs[-1], heads=last)


def filling_figures(layers: Sequence[Costs]) -> list[Figure]:
    """What partial microbatches in the bubbles are worth: gradients of more microbatches in nearly the same time."""
    figures = []
    steps = []
    for p, m in ((4, 8), (4, 16), (8, 16)):
        costs = on_ranks(layers, p)
        filling = best_fill(Pipeline(p, m, _heads(costs)), costs, slack=0.02, planned_heads=True)
        extra, ratio = filling.warmup + filling.cooldown, filling.timeline.makespan / filling.plain.makespan
        figures.append(Figure(f"p={p} M={m}, measured times: microbatches that fill bubbles", extra))
        figures.append(Figure(f"p={p} M={m}, measured times: step with them / without", ratio, "x"))
        steps.append(ratio)
    name = "measured times: step with filled bubbles / without, largest of three"
    return [*figures, Figure(name, max(steps), "x", 1.02, False)]


def model_config(row: Row, exits: tuple[int, ...], planned: bool = False, layout: str | None = None) -> RunConfig:
    """A row's flags, as the launch scripts give them; vocabulary of 32,000, sequences of 2,048."""
    return RunConfig(
        model=ModelConfig(
            num_layers=row.layers, hidden_size=row.hidden, num_attention_heads=row.heads, seq_length=2048,
            untie_embeddings_and_output_weights=row.untied, attention_dropout=0.0, hidden_dropout=0.0,
        ),
        exits=ExitConfig(exit_layer_nums=exits, pre_exit=True, untie_exit_output_weights=row.untied),
        parallel=ParallelConfig(
            tensor_model_parallel_size=row.tp, pipeline_model_parallel_size=4, pipeline_model_parallel_layout=layout,
            sequence_parallel=row.tp > 1, use_distributed_optimizer=True,
            exit_placement="planned" if planned else "before-backward",
        ),
        training=TrainingConfig(micro_batch_size=row.micro, global_batch_size=2048),
        precision=PrecisionConfig(bf16=True),
    )  # fmt: skip


def model_figures(row: Row) -> list[Figure]:
    """What two exits add to a step on 4 pipeline ranks, in percent of the step without exits on equal stages."""
    device, world = preset("A100-80GB", "bfloat16"), 16 * row.tp

    def passes(exits: tuple[int, ...], planned: bool = False, layout: str | None = None) -> float:
        return estimate(Setup(model_config(row, exits, planned, layout), world, 32000, device)).forward_backward

    without = passes(())
    bare, setup = model_config(row, ()), Setup(model_config(row, row.exits), world, 32000, device)
    best, best_without = (write_layout(balance(layer_work(one), 4)) for one in (setup, replace(setup, config=bare)))
    added = {
        "two exits": passes(row.exits) / without,
        "heads in idle slots": passes(row.exits, planned=True) / without,
        f"and layout {best}": passes(row.exits, True, best) / without,
    }
    goals = (row.overhead + 0.005, None, 0.0)
    figures = [
        Figure(f"{row.name} by FLOPs, p=4: {name}, added to the step", 100 * (ratio - 1), "%", goal, False)
        for (name, ratio), goal in zip(added.items(), goals, strict=True)
    ]
    ratio = passes(row.exits, True, best) / passes((), False, best_without)
    name = f"{row.name} by FLOPs: the same, against layout {best_without} without exits"
    heads = 2 * layer_work(setup).last / without
    flops = [training_flops_per_token(setup.config.model, exits, 32000) for exits in (setup.config.exits, ExitConfig())]
    return [
        *figures,
        Figure(name, 100 * (ratio - 1), "%"),
        Figure(f"{row.name} by FLOPs: work of both exits for one microbatch, of the step", 100 * heads, "%"),
        Figure(f"{row.name} by FLOPs: two exits added to a step on one stage", 100 * (flops[0] / flops[1] - 1), "%"),
    ]


def layer_work(setup: Setup) -> Work:
    """Time of each layer with its exits, and of the embedding and the final head."""
    alone = replace(setup.config.parallel, pipeline_model_parallel_size=1)
    return Family(replace(setup, config=replace(setup.config, parallel=alone))).work


def traced_step(mesh: Mesh, config: RunConfig) -> tuple[bool, list, list]:
    """On one of two ranks: whether it did what was planned, in that order; what happened; and the plan."""
    trainer = build(mesh, config, torch.float32)
    batches = [random_batch(1, 16, VOCAB, seed=m) for m in range(8)]
    for _ in range(3):
        recorder = Recorder(mesh.backend.stamp, mesh.backend.seconds)
        train_step(trainer, batches, recorder)
    happened, planned = recorder.happened(), trainer.plan(8).schedule
    return [one.action for one in happened] == list(planned[mesh.rank("pp")]), happened, list(planned)


def real_figures() -> list[Figure]:
    """Two real pipeline ranks, every schedule: order and counts of the actions, wall clock beside the simulation."""
    kinds = {
        "1f1b": "", "gpipe": "--pipeline-schedule gpipe", "zb-h1": "--pipeline-schedule zb-h1",
        "interleaved": "--num-layers-per-virtual-pipeline-stage 1", "heads in idle slots": "--exit-placement planned",
    }  # fmt: skip
    pool, figures, exact = Ranks(2), [], []
    try:
        for name, flags in kinds.items():
            config = toy_config("--exit-layer-nums", "1", "3", *flags.split())
            answers = pool.run(traced_step, config, pp=2)
            exact += [right for right, _, _ in answers]
            happened = [one for _, one, _ in answers]
            simulated = simulate(Schedule.of(answers[0][2]), measured_costs(happened)).makespan
            took = max(one.end for rank in happened for one in rank)
            figures.append(Figure(f"2 ranks, {name}: wall clock / simulation", took / simulated, "x"))
    finally:
        pool.close()
    name = f"2 ranks, {len(kinds)} schedules: share of ranks that did what was planned, in order"
    return [*figures, Figure(name, sum(exact) / len(exact), "", 1.0)]


say: Callable[[str], object] = lambda line: sys.stdout.write(line + "\n")  # noqa: E731


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    figures = schedule_figures(64 if options.quick else 256, 6 if options.quick else 24)
    for row in MODELS:
        figures += model_figures(row)
    return finish("pipeline", figures + real_figures(), options)


if __name__ == "__main__":
    raise SystemExit(main())
