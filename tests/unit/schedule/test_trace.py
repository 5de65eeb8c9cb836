"""What was recorded, as a timeline, as costs and as trace events."""

from megatron.schedule.actions import Action, Schedule
from megatron.schedule.draw import figure
from megatron.schedule.simulate import Costs, Span, simulate
from megatron.schedule.trace import Happened, Recorder, measured_costs, timeline, trace_events


def happened(text: str, turn: float, start: float, end: float) -> Happened:
    return Happened(Action.parse(text), turn, start, end)


RANK = [
    happened("0F0", 0.0, 0.0, 2.0),
    happened("0SEND_F0", 2.0, 2.0, 2.1),
    happened("0F1", 2.1, 2.1, 3.1),
    happened("0E0", 3.1, 3.1, 3.6),
    happened("0B0", 3.6, 5.0, 8.0),
    happened("0F2", 8.0, 8.0, 9.5),
    happened("0R0", 9.5, 9.5, 9.6),
]
SPLIT = [happened("1I0", 0.0, 0.5, 1.5), happened("1W0", 1.5, 1.5, 2.25)]


def test_a_recorder_tells_waiting_from_work() -> None:
    clock = iter(range(100))
    recorder = Recorder(lambda: next(clock), lambda start, end: end - start)  # the origin is stamp 0
    recorder.turn(Action.parse("0F0"))
    recorder.end()
    recorder.turn(Action.parse("0B0"))
    recorder.start()
    recorder.end()
    assert recorder.happened() == [happened("0F0", 1, 1, 2), happened("0B0", 3, 4, 5)]


def test_a_timeline_shows_work_but_neither_waits_nor_messages() -> None:
    (spans,) = timeline([RANK]).spans
    assert [str(span.action) for span in spans] == ["0F0", "0F1", "0E0", "0B0", "0F2", "0R0"]
    assert spans[3] == Span(Action.parse("0B0"), 5.0, 8.0)


def test_costs_are_median_times() -> None:
    assert measured_costs([RANK, SPLIT]) == [
        Costs(forward=1.5, heads=0.5, input=3.0, weight=0.0),
        Costs(forward=0.0, heads=0.0, input=1.0, weight=0.75),
    ]


def test_events_are_in_microseconds_with_waits_apart() -> None:
    found = trace_events([("pp=0", RANK), ("pp=1", SPLIT)])["traceEvents"]
    assert {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "pp=1"}} in found
    backward = {"name": "0B0", "cat": "B", "ph": "X", "ts": 5e6, "dur": 3e6, "pid": 0, "tid": 0}
    assert backward | {"args": {"stage": 0, "microbatch": 0}} in found
    (wait,) = [event for event in found if event["name"] == "wait for 0B0"]
    assert (wait["ts"], wait["dur"]) == (3.6e6, 1.4e6)


def test_measured_and_simulated_times_share_a_picture() -> None:
    ranks = [[entry for entry in RANK if entry.action.op.value in "FEB" and entry.action.microbatch == 0]]
    schedule_of_rank = [[entry.action for entry in ranks[0]]]
    simulated = simulate(Schedule.of(schedule_of_rank), measured_costs(ranks))
    assert simulated.makespan == 5.5
    picture = figure([("measured", timeline(ranks).scaled(1e3)), ("simulated", simulated.scaled(1e3))], "ms")
    assert [axes.get_title(loc="left").split("   ")[0] for axes in picture.axes] == ["measured", "simulated"]
