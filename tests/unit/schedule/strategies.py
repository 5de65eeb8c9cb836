"""What the tests of this room draw at random: pipelines, costs, and valid schedules that no generator makes."""

import random

from hypothesis import strategies as st

from megatron.schedule.actions import Action, Flow, Op, Pipeline, Schedule, ScheduleError, other_end
from megatron.schedule.fill import fill_bubbles, most_fillers
from megatron.schedule.generate import GENERATORS
from megatron.schedule.simulate import Costs

KINDS = sorted(GENERATORS)
times = st.integers(1, 12).map(lambda quarter: quarter / 4)  # exact in binary: sums compare exactly


def everywhere(num_ranks: int, num_microbatches: int) -> Pipeline:
    """One stage a rank, heads on all."""
    return Pipeline(num_ranks, num_microbatches, frozenset(range(num_ranks)))


@st.composite
def pipelines(draw, most_ranks=16, most_microbatches=64, chunks=1, tuning=False):
    """Any p, m, and set of stages with exits."""
    p, m = draw(st.integers(1, most_ranks)), draw(st.integers(1, most_microbatches))
    stages = p * chunks
    heads = draw(st.frozensets(st.integers(0, stages - 1), min_size=1, max_size=stages))
    return Pipeline(p, m, heads if tuning else heads | {stages - 1}, chunks, tuning)


@st.composite
def generated(draw, most_ranks=16, most_microbatches=64, kinds=(*KINDS, "fill")):
    """A pipeline with a schedule for it, without messages."""
    kind, tuning = draw(st.sampled_from(kinds)), draw(st.booleans())
    chunks = draw(st.integers(2, 4)) if kind == "interleaved" else 1
    if kind == "fill":
        return draw(filled(most_ranks, most_microbatches))
    pipeline = draw(pipelines(max(1, most_ranks // chunks), most_microbatches, chunks, tuning))
    return pipeline, GENERATORS[kind](pipeline)


@st.composite
def filled(draw, most_ranks=16, most_microbatches=64):
    """A pipeline with a bubble-filled schedule."""
    pipeline = draw(pipelines(most_ranks, most_microbatches))
    ratio = draw(st.sampled_from([0.5, 1.0, 1.7, 2.0, 3.0]))
    room = max(0, pipeline.num_microbatches - pipeline.num_ranks)
    most = most_fillers(pipeline.num_ranks, ratio)
    warmup = draw(st.integers(0, min(most, room)))
    cooldown = draw(st.integers(0, min(most, room - warmup)))
    return pipeline, fill_bubbles(pipeline, warmup, cooldown, ratio)


@st.composite
def stage_costs(draw, num_stages, messages=True):
    """Costs of each stage, all different."""
    costs = []
    for _ in range(num_stages):
        forward, heads, of_input, weight, message = (draw(times) for _ in range(5))
        costs.append(Costs(forward, heads, of_input, weight, message if messages else 0.0))
    return costs


def shuffled(pipeline: Pipeline, seed: int, partial: bool = False) -> Schedule:
    """A step's computes in a random order that respects what builds on what, E and halves of B anywhere.

    partial: some microbatches turn back early, or are dropped on the first stages.
    """
    rng = random.Random(seed)
    spans = [
        _span(pipeline, rng) if partial else (0, pipeline.active_stages - 1) for _ in range(pipeline.num_microbatches)
    ]
    spans[rng.randrange(len(spans))] = (0, pipeline.active_stages - 1)
    todo = [action for m, span in enumerate(spans) for action in _computes(pipeline, m, span, rng)]
    flow = Flow.of(Schedule.of([todo]))
    done: set[Action] = set()
    ranks: list[list[Action]] = [[] for _ in range(pipeline.num_ranks)]
    while todo:
        action = rng.choice([a for a in todo if _ready(a, flow, done, pipeline)])
        todo.remove(action)
        done.add(action)
        ranks[action.stage % pipeline.num_ranks].append(action)
    return Schedule.of(ranks)


def _span(pipeline: Pipeline, rng: random.Random) -> tuple[int, int]:
    """First and last stage of a microbatch's way back: a filler's, one that is dropped, or a whole one's."""
    last = pipeline.active_stages - 1
    turns = sorted(pipeline.heads - {last})
    kind = rng.choice(["whole", "whole", "filler", "dropped"])
    if pipeline.tuning or (kind == "filler" and not turns):
        return 0, last
    return {"whole": (0, last), "filler": (0, rng.choice(turns or [last])), "dropped": (rng.randint(0, last), last)}[
        kind
    ]


def _computes(pipeline: Pipeline, m: int, span: tuple[int, int], rng: random.Random) -> list[Action]:
    actions = []
    for stage in range(span[1] + 1):
        back = [[Op.BACKWARD], [Op.INPUT, Op.WEIGHT]][rng.randrange(2)]
        heads = [Op.HEADS] if stage in pipeline.heads else []
        after = [Op.DROP] if stage < span[0] else heads if pipeline.tuning else heads + back
        actions += [Action(stage, op, m) for op in [Op.FORWARD, *after]]
    return actions


def _ready(action: Action, flow: Flow, done: set[Action], pipeline: Pipeline) -> bool:
    stage, op, microbatch = action
    needs = flow.needs(action)
    if needs:
        makers = [Op.FORWARD] if op is Op.FORWARD else [Op.BACKWARD, Op.INPUT]
        if not any(Action(other_end(needs).stage, maker, microbatch) in done for maker in makers):
            return False
    own = {Op.FORWARD: [], Op.HEADS: [Op.FORWARD], Op.DROP: [Op.FORWARD], Op.WEIGHT: [Op.INPUT]}
    before = own.get(op, [Op.FORWARD, Op.HEADS])
    if stage not in pipeline.heads:
        before = [earlier for earlier in before if earlier is not Op.HEADS]
    return all(Action(stage, earlier, microbatch) in done for earlier in before)


def finishes(schedule: Schedule, pipeline: Pipeline) -> bool:
    """An independent judge: run the schedule with blocking sends and symbols for values, see whether all come right.

    Values are (what, stage, microbatch); queues between ranks carry them without names, as a network does.
    """
    try:
        return _Symbols(schedule, pipeline).run()
    except (KeyError, ScheduleError):
        return False


class _Symbols:
    def __init__(self, schedule: Schedule, pipeline: Pipeline) -> None:
        self.schedule, self.pipeline, self.flow = schedule, pipeline, Flow.of(schedule)
        self.kept: list[set] = [set() for _ in schedule]  # of each rank
        self.queues: dict[tuple[int, int], list] = {}
        self.slots: dict[tuple[int, int], list] = {}  # receives that are posted and not yet met

    def run(self) -> bool:
        places = [0] * len(self.schedule)
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(self.schedule):
                while places[rank] < len(actions) and self.step(rank, actions[places[rank]]):
                    places[rank] += 1
                    moved = True
        ended = all(place == len(actions) for place, actions in zip(places, self.schedule, strict=True))
        return ended and not any(self.slots.values())

    def step(self, rank: int, action: Action) -> bool:
        stage, op, m = action
        kept, p = self.kept[rank], len(self.schedule)
        if op in (Op.RECV_F, Op.RECV_B):
            source = (stage + (-1 if op is Op.RECV_F else 1)) % p
            self.slots.setdefault((source, rank), []).append(action)
            return True
        if op in (Op.SEND_F, Op.SEND_B):
            target = stage + (1 if op is Op.SEND_F else -1)
            value = ("x" if op is Op.SEND_F else "g", stage, m)
            if value not in kept:
                raise KeyError(value)
            slots = self.slots.get((rank, target % p), [])
            if not slots:
                return False
            slot = slots.pop(0)
            self.kept[target % p].add(("in", slot, value))
            return True
        needs = self.flow.needs(action)
        if needs:
            value = ("x" if op is Op.FORWARD else "g", other_end(needs).stage, m)
            local = other_end(needs).stage % p == rank
            if not local and ("in", needs, value) not in kept:
                if any(item[:2] == ("in", needs) for item in kept):
                    raise KeyError(f"{action} got another microbatch's message")
                return False
            if local and value not in kept:
                raise KeyError(value)
        return self.compute(kept, stage, op, m)

    def compute(self, kept: set, stage: int, op: Op, m: int) -> bool:
        if op is Op.FORWARD:
            kept |= {("x", stage, m), ("acts", stage, m)}
        elif op is Op.HEADS:
            kept.add(("taps", stage, m)) if ("acts", stage, m) in kept else self.fail(op)
        elif op is Op.WEIGHT:
            kept.remove(("half", stage, m))
        elif op is not Op.REDUCE:
            kept.remove(("acts", stage, m))
            kept.discard(("x", stage, m))
            if op is not Op.DROP:
                if stage in self.pipeline.heads:
                    kept.remove(("taps", stage, m))
                kept.add(("g", stage, m))
            if op is Op.INPUT:
                kept.add(("half", stage, m))
        return True

    def fail(self, op: Op) -> None:
        raise KeyError(op)
