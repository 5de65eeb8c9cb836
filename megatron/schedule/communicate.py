"""Adds to the computes of a schedule what goes between ranks: messages, and reductions of gradients. No torch."""

from collections.abc import Mapping

from megatron.schedule.actions import RECEIVES, Action, Flow, Op, Schedule, ScheduleError, other_end
from megatron.schedule.check import NO_BUCKETS, Rendezvous, adds_gradients

Receives = list[list[list[Action]]]  # by rank and position of a compute: what is posted before it
MOST_AHEAD = 4  # computes; the generators' schedules need 1, interleaved and zero-bubble ones 2 or 3


def communicate(schedule: Schedule) -> Schedule:
    """Add sends and receives: each send right after what makes the message, each receive some actions before its use.

    Between two ranks, receives are posted in the order of the sends: one action ahead of the use, or as many more as
    it takes that sends which block until the receive is posted never deadlock. Stages on one rank hand over without a
    message. Raises ScheduleError where the computes themselves wait for each other in a circle.
    """
    if schedule.has_messages:
        raise ScheduleError("the schedule has messages already: add them once, to computes alone")
    flow = Flow.of(schedule)
    for ahead in range(1, MOST_AHEAD + 1):
        machine = Rendezvous(_with_messages(schedule, flow, ahead), flow)
        if machine.run():
            return Schedule.of(machine.lists)
    return _without_deadlock(machine, schedule)


def add_reductions(
    schedule: Schedule, buckets: Mapping[int, int], head_buckets: Mapping[int, int] = NO_BUCKETS
) -> Schedule:
    """Add R for each gradient bucket of each stage, right after the last action that adds to it.

    A stage's buckets are numbered from 0 and follow its last E, B or W. Its head_buckets (weights that heads alone
    use) are numbered after those and follow its last E. A send of the same action goes first. Raises ScheduleError for
    a stage that makes no such gradients.
    """
    lists = [list(rank) for rank in schedule]
    for stage in sorted({*buckets, *head_buckets}):
        layers, heads = buckets.get(stage, 0), head_buckets.get(stage, 0)
        for first, count, heads_only in ((0, layers, False), (layers, heads, True)):
            _insert_reductions(lists[stage % len(lists)], stage, range(first, first + count), heads_only)
    return Schedule.of(lists)


def _with_messages(schedule: Schedule, flow: Flow, ahead: int) -> Schedule:
    receives = _post_receives(schedule, flow, ahead)
    lists = []
    for rank, actions in enumerate(schedule):
        merged = []
        for place, action in enumerate(actions):
            merged += [*reversed(receives[rank][place]), action]
            send = flow.makes(action)
            if send and schedule.rank_of(other_end(send).stage) != rank:
                merged.append(send)
        lists.append(merged)
    return Schedule.of(lists)


def _post_receives(schedule: Schedule, flow: Flow, ahead: int) -> Receives:
    """Each receive `ahead` computes before its use, or with a later message of the same queue that is used before.

    The lists are filled from the last message to the first: read them backwards.
    """
    queues: dict[tuple[int, int], list[Action]] = {}  # (from, to) -> receives, in the order of the sends
    use: dict[Action, int] = {}  # receive -> position of the compute that needs it
    for rank, actions in enumerate(schedule):
        for place, action in enumerate(actions):
            needs, makes = flow.needs(action), flow.makes(action)
            if needs:
                use[needs] = place
            if makes and (target := schedule.rank_of(other_end(makes).stage)) != rank:
                queues.setdefault((rank, target), []).append(other_end(makes))
    receives: Receives = [[[] for _ in rank] for rank in schedule]
    for (_, rank), messages in queues.items():
        place = len(schedule[rank])
        for message in reversed(messages):
            place = min(place, max(0, use[message] - ahead))
            receives[rank][place].append(message)
    return receives


def _without_deadlock(machine: Rendezvous, schedule: Schedule) -> Schedule:
    """Wherever ranks wait for each other, post the receives that they wait for at once, and go on."""
    while not machine.run():
        moved = False
        for action in machine.stuck.values():
            receive = machine.waits_for(action)
            if receive and receive.op in RECEIVES:
                rank = schedule.rank_of(receive.stage)
                actions, place = machine.lists[rank], machine.place[rank]
                actions.insert(place, actions.pop(actions.index(receive, place)))
                moved = True
        if not moved:
            raise ScheduleError("the computes wait for each other in a circle\n" + machine.picture())
    return Schedule.of(machine.lists)


def _insert_reductions(actions: list[Action], stage: int, buckets: range, heads_only: bool) -> None:
    if not buckets:
        return
    adding = [i for i, a in enumerate(actions) if a.stage == stage and adds_gradients(a, heads_only)]
    if not adding:
        raise ScheduleError(
            f"stage {stage} makes no gradients for a bucket: it has no {'heads' if heads_only else 'backward'}"
        )
    place = adding[-1] + 1
    if place < len(actions) and actions[place].op is Op.SEND_B:
        place += 1
    actions[place:place] = [Action(stage, Op.REDUCE, bucket) for bucket in buckets]
