"""Schedules come to their end on GPUs: a model of how nccl runs messages, fed with what a rank really posts.

Each process group runs its messages on a stream of its own, one after another in the order in which this rank posted
them; a message occupies the stream until the partner's end of it has come to the head of the partner's. The host runs
on: a message may start once all that the rank computed before it is done, and a compute waits for its own receives.
What a rank posts comes from the executor and the real `PipelineLink`, with torch.distributed replaced by a notebook.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.parallel import p2p
from megatron.schedule.actions import Pipeline, Schedule
from megatron.schedule.communicate import communicate
from megatron.schedule.execute import Plan, Step, run
from megatron.schedule.fill import fill_bubbles, most_fillers
from megatron.schedule.generate import GENERATORS, one_f_one_b
from megatron.schedule.place import place_heads
from megatron.schedule.simulate import Costs
from tests.unit.schedule.strategies import generated, pipelines, shuffled, stage_costs

Group = tuple[int, int, int]  # sender, receiver, direction


@dataclass
class Line:
    """What a `PipelineLink` asks of a mesh with pipeline ranks alone. A group is the number of the call that made it,
    the same on all ranks."""

    number: int
    total: int
    made: int = 0

    def size(self, axis: str) -> int:
        return self.total

    def rank(self, axis: str) -> int:
        return self.number

    def peer(self, axis: str, coordinate: int) -> int:
        return coordinate

    def subgroup(self, axis: str, coordinates: list[int]) -> int | None:
        self.made += 1
        return self.made if self.number in coordinates else None


@dataclass
class Notebook:
    """In torch.distributed's place: events ("send" or "recv", group, partner), and ("wait", which receive)."""

    events: list[tuple] = field(default_factory=list)

    def isend(self, tensor: torch.Tensor, peer: int, group: int) -> SimpleNamespace:
        self.events.append(("send", group, peer))
        return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    def irecv(self, into: torch.Tensor, peer: int, group: int) -> SimpleNamespace:
        number = len(self.events)
        self.events.append(("recv", group, peer))
        return SimpleNamespace(wait=lambda: self.events.append(("wait", number)))


class Hollow:
    """A stage that computes nothing."""

    tensor = torch.zeros(())

    def forward(self, batch, stream, received=None):
        return SimpleNamespace(take_hidden=lambda: self.tensor)

    def backward_heads(self, activations, batch, objective, share):
        return None, []

    def backward(self, activations, gradients, received=None):
        return self.tensor

    def backward_input(self, activations, gradients, received=None):
        return self.tensor, []

    def empty_message(self, batch):
        return self.tensor


def posted(schedule: Schedule) -> list[list[tuple]]:
    """What each rank posts and waits for, in order. `schedule` has messages."""
    plan, p, m = Plan.of(schedule), len(schedule), schedule.num_microbatches
    step = Step(dict.fromkeys(range(schedule.num_stages), Hollow()), [None] * m, [None] * m, None, lambda *_: None)
    traces = []
    for rank in range(p):
        notebook = Notebook()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(p2p, "dist", notebook)
            run(plan, rank, step, p2p.PipelineLink.build(Line(rank, p)) if p > 1 else None)
        traces.append(notebook.events)
    return traces


def comes_to_its_end(traces: list[list[tuple]], stream_of: Callable[[int, int, int], object] | None = None) -> bool:
    """Run the streams. stream_of: from a group's number and the ranks at its ends to what shares a stream; default:
    each group has its own."""
    places = [0] * len(traces)
    streams: dict[
        tuple[int, object], deque
    ] = {}  # (rank, stream) -> messages not yet gone: (event's place, kind, peer)
    arrived: list[set[int]] = [set() for _ in traces]
    ready = deque(range(len(traces)))
    while ready:
        rank = ready.popleft()
        events = traces[rank]
        while places[rank] < len(events):
            event = events[places[rank]]
            if event[0] == "wait":
                if event[1] not in arrived[rank]:
                    break
            else:
                kind, group, peer = event
                stream = group if stream_of is None else stream_of(group, rank, peer)
                streams.setdefault((rank, stream), deque()).append((places[rank], kind, peer))
                ready += _meet(streams, stream, rank, peer, arrived)
            places[rank] += 1
    through = all(place == len(events) for place, events in zip(places, traces, strict=True))
    return through and not any(streams.values())


def _meet(streams: dict, stream: object, rank: int, peer: int, arrived: list[set[int]]) -> list[int]:
    """Let go what has come to the head of both ends' streams; returns the ranks that something arrived at."""
    mine, theirs = streams[rank, stream], streams.get((peer, stream), deque())
    woken = []
    while mine and theirs and mine[0][1] != theirs[0][1] and (mine[0][2], theirs[0][2]) == (peer, rank):
        for end, (place, kind, _) in ((rank, mine.popleft()), (peer, theirs.popleft())):
            if kind == "recv":
                arrived[end].add(place)
                woken.append(end)
    return woken


def ends_with_one_hardware_queue(traces: list[list[tuple]]) -> bool:
    """The same where the device starts everything in the order of its launch (CUDA_DEVICE_MAX_CONNECTIONS=1): what
    waits, be it for an earlier message of its group, holds up all that was launched after it."""
    started = [0] * len(traces)
    gone: list[set[int]] = [set() for _ in traces]  # places of messages that both ends have
    latest: list[dict[int, tuple[int, int]]] = [{} for _ in traces]  # by group: number and place of the last started
    running: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (group, number) -> ends that have started
    ready = deque(range(len(traces)))
    while ready:
        rank = ready.popleft()
        for place in range(started[rank], len(traces[rank])):
            kind, what, *_ = traces[rank][place]
            number, earlier = latest[rank].get(what, (-1, None))
            if (kind == "wait" and what not in gone[rank]) or (kind != "wait" and not {earlier} <= gone[rank] | {None}):
                break
            started[rank] += 1
            if kind == "wait":
                continue
            latest[rank][what] = number + 1, place
            ends = running.setdefault((what, number + 1), [])
            ends.append((rank, place))
            if len(ends) == 2:
                for end, its_place in ends:
                    gone[end].add(its_place)
                    ready.append(end)
    return all(count == len(events) for count, events in zip(started, traces, strict=True))


def one_for_both_ways(group: int, rank: int, peer: int) -> frozenset:
    """As if each pair of ranks had a single group."""
    return frozenset((rank, peer))


def check(schedule: Schedule) -> None:
    assert comes_to_its_end(posted(communicate(schedule)))


@settings(max_examples=60, deadline=None)
@given(st.data(), generated(most_ranks=8, most_microbatches=32))
def test_generated_schedules_come_to_their_end(data, case):
    """Also with heads planned into idle time."""
    _, schedule = case
    check(schedule)
    check(place_heads(schedule, data.draw(stage_costs(schedule.num_stages))))


@settings(max_examples=60, deadline=None)
@given(generated(most_ranks=8, most_microbatches=32, kinds=("1f1b", "gpipe", "zb-h1", "fill")))
def test_one_stage_a_rank_needs_one_hardware_queue(case):
    _, schedule = case
    assert ends_with_one_hardware_queue(posted(communicate(schedule)))


def test_interleaved_schedules_need_several_hardware_queues():
    """A known limit: they post a second receive of a group ahead of a send without which the first does not come."""
    pipeline = Pipeline(2, 2, frozenset(range(4)), chunks=2)
    traces = posted(communicate(GENERATORS["interleaved"](pipeline)))
    assert comes_to_its_end(traces)
    assert not ends_with_one_hardware_queue(traces)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 2**32))
def test_any_valid_schedule_comes_to_its_end(data, chunks, seed):
    pipeline = data.draw(pipelines(most_ranks=5 - chunks, most_microbatches=6, chunks=chunks))
    check(shuffled(pipeline, seed, partial=True))


def every_schedule(p: int, m: int):
    """Of all generators, with heads everywhere and heads at the end alone, and with all numbers of fillers."""
    for chunks in (1, 2, 3):
        kinds = ("1f1b", "gpipe", "zb-h1") if chunks == 1 else ("interleaved",)
        for heads in (range(p * chunks), [p * chunks - 1]):
            pipeline = Pipeline(p, m, frozenset(heads), chunks)
            yield from (GENERATORS[kind](pipeline) for kind in kinds)
    everywhere = Pipeline(p, m, frozenset(range(p)))
    for warmup in range(most_fillers(p) + 1):
        for cooldown in range(most_fillers(p) + 1):
            if warmup + cooldown and m >= p + warmup + cooldown:
                yield fill_bubbles(everywhere, warmup, cooldown)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("p", range(2, 9))
def test_every_schedule_comes_to_its_end(p):
    """All m up to 32."""
    for m in range(1, 33):
        for schedule in every_schedule(p, m):
            check(schedule)
            costs = [Costs(heads=0.5, message=0.25)] * schedule.num_stages
            placed = place_heads(schedule, costs)
            if placed != schedule:
                check(placed)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (8, 32)])
def test_one_group_for_both_ways_would_hang(p, m):
    """A receive that is posted early then holds up the send behind it, and the partner likewise."""
    traces = posted(communicate(one_f_one_b(Pipeline(p, m, frozenset({p - 1})))))
    assert comes_to_its_end(traces)
    assert not comes_to_its_end(traces, one_for_both_ways)


def test_a_message_that_nobody_takes_is_noticed():
    """The tests' own model: ends that don't meet, and a wait for what never comes."""
    assert comes_to_its_end([[("send", 1, 1)], [("recv", 1, 0), ("wait", 0)]])
    assert not comes_to_its_end([[("send", 1, 1)], []])
    assert not comes_to_its_end([[("send", 1, 1)], [("recv", 2, 0), ("wait", 0)]])
    assert not comes_to_its_end([[], [("recv", 1, 0), ("wait", 0)]])
    crossed = [[("send", 1, 1), ("recv", 2, 1), ("wait", 1)], [("send", 2, 0), ("recv", 1, 0), ("wait", 1)]]
    assert comes_to_its_end(crossed)
    assert not comes_to_its_end(crossed, one_for_both_ways)
