"""A schedule is proved sound before it is used: complete, in order, messages paired, no deadlock, memory. No torch.

`check` looks at the computes, `validate` at everything. Messages from one rank to another form one queue, whatever
stages they belong to (nccl pairs them by their order alone), and a send may block its rank until the receive is posted.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain

from megatron.schedule.actions import (
    BACKWARDS,
    COMPUTES,
    RECEIVES,
    SENDS,
    Action,
    Flow,
    Op,
    Pipeline,
    Schedule,
    ScheduleError,
    other_end,
)

Places = dict[Action, tuple[int, int]]  # rank and position of each action
NO_BUCKETS: Mapping[int, int] = {}


def check(schedule: Schedule, pipeline: Pipeline) -> None:
    """Raise ScheduleError unless each rank runs what `pipeline` asks for: all of it, once, and in order.

    Messages are not looked at: `validate` does that.
    """
    _check_computes(schedule, pipeline, Flow.of(schedule))


def validate(
    schedule: Schedule,
    pipeline: Pipeline,
    buckets: Mapping[int, int] = NO_BUCKETS,
    head_buckets: Mapping[int, int] = NO_BUCKETS,
    max_in_flight: int | Sequence[int] | None = None,
) -> None:
    """Raise ScheduleError unless `schedule` does what `pipeline` asks for and runs to its end.

    buckets, head_buckets: how many gradient buckets a stage reduces, as for `communicate.add_reductions`.
    max_in_flight: most microbatches whose activations a rank may hold at a time, for all ranks or for each.
    """
    flow = Flow.of(schedule)
    places = _check_computes(schedule, pipeline, flow)
    _check_messages(schedule, flow, places)
    _check_queues(schedule)
    _check_reductions(schedule, places, buckets, head_buckets)
    machine = Rendezvous(schedule, flow)
    if not machine.run():
        raise ScheduleError("deadlock: no rank can go on\n" + machine.picture())
    if max_in_flight is not None:
        _check_memory(schedule, pipeline, max_in_flight)


class Rendezvous:
    """Runs a schedule with sends that block until the receive is posted: `run` tells whether it comes to its end.

    After a run that did not, `stuck` says where each unfinished rank stands; `lists` may be mended and run on.
    """

    def __init__(self, schedule: Schedule, flow: Flow) -> None:
        self.lists = [list(rank) for rank in schedule]
        self.place = [0] * len(self.lists)
        self._flow = flow
        self._posted: set[Action] = set()  # receives
        self._arrived: set[Action] = set()  # receives whose message is there

    def run(self) -> bool:
        """Go on until all ranks are through or none can move."""
        p = len(self.lists)
        ready = deque(range(p))
        while ready:
            rank = ready.popleft()
            actions, place = self.lists[rank], self.place[rank]
            while place < len(actions) and self._can_run(actions[place], p):
                action = actions[place]
                place += 1
                if action.op in RECEIVES:
                    self._posted.add(action)
                    ready.append(other_end(action).stage % p)
                elif action.op in SENDS:
                    self._arrived.add(other_end(action))
                    ready.append(other_end(action).stage % p)
            self.place[rank] = place
        return not self.stuck

    @property
    def stuck(self) -> dict[int, Action]:
        """The action at which each unfinished rank stands."""
        return {r: self.lists[r][at] for r, at in enumerate(self.place) if at < len(self.lists[r])}

    def waits_for(self, action: Action) -> Action | None:
        """The action of another rank without which `action` cannot run; None where it waits for none."""
        if action.op in SENDS:
            return other_end(action)
        message = self._flow.needs(action)
        return other_end(message) if message else None

    def picture(self) -> str:
        """A line a rank: where it stands, what is before and after, and what it waits for."""
        lines = []
        for rank, (actions, place) in enumerate(zip(self.lists, self.place, strict=True)):
            before = " ".join(["..."] * (place > 3) + [str(a) for a in actions[max(0, place - 3) : place]])
            if place == len(actions):
                lines.append(f"rank {rank}: {before} (done)")
                continue
            after = " ".join([str(a) for a in actions[place + 1 : place + 4]] + ["..."] * (place + 4 < len(actions)))
            waits = self.waits_for(actions[place])
            lines.append(f"rank {rank}: {before} {actions[place]} <-- HERE, waits for {waits}; then {after}")
        return "\n".join(lines)

    def _can_run(self, action: Action, p: int) -> bool:
        if action.op in SENDS:
            return other_end(action) in self._posted
        message = self._flow.needs(action)
        if message is None:
            return True
        local = other_end(message).stage % p == action.stage % p
        return local or message in self._arrived


def most_in_flight(schedule: Schedule) -> list[int]:
    """Most microbatches that each rank holds activations of at a time; a rank's stages count one by one."""
    last = {(a.stage, a.microbatch): a for rank in schedule for a in rank if a.op in COMPUTES}
    most = []
    for rank in schedule:
        held = peak = 0
        for action in rank:
            if action.op is Op.FORWARD:
                held += 1
                peak = max(peak, held)
            if action.op in COMPUTES and last[action.stage, action.microbatch] is action:
                held -= 1
        most.append(peak)
    return most


def _check_computes(schedule: Schedule, pipeline: Pipeline, flow: Flow) -> Places:
    """Complete and in order on each rank; returns where each action stands."""
    places = _find_places(schedule, pipeline)
    for microbatch in range(pipeline.num_microbatches):
        _check_path(schedule, pipeline, flow, places, microbatch)
    _check_order(flow, places)
    return places


def _find_places(schedule: Schedule, pipeline: Pipeline) -> Places:
    """Where each action stands; every action belongs there, and none stands twice."""
    if schedule.num_ranks != pipeline.num_ranks:
        raise ScheduleError(f"the schedule has {schedule.num_ranks} ranks, the pipeline {pipeline.num_ranks}")
    places: Places = {}
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            problem = _misplaced(action, rank, pipeline)
            if action in places:
                problem = f"occurs more than once: it is at position {places[action][1]} already"
            if problem:
                raise ScheduleError(f"rank {rank}, position {position}: {action} {problem}")
            places[action] = (rank, position)
    return places


def _misplaced(action: Action, rank: int, pipeline: Pipeline) -> str | None:
    """Why `action` cannot be on `rank` at all."""
    if action.stage >= pipeline.active_stages:
        return f"is beyond the last stage that runs, {pipeline.active_stages - 1}"
    if action.stage % pipeline.num_ranks != rank:
        return f"belongs to rank {action.stage % pipeline.num_ranks}, which has that stage"
    if action.op is not Op.REDUCE and action.microbatch >= pipeline.num_microbatches:
        return f"is beyond the step's {pipeline.num_microbatches} microbatches"
    return None


def _check_path(schedule: Schedule, pipeline: Pipeline, flow: Flow, places: Places, microbatch: int) -> None:
    """One microbatch, stage by stage: how deep it goes, and that each stage finishes what it begins.

    A microbatch that ends above the last stage is a warm-up filler, which goes back all the way. One that is dropped
    is a cool-down filler: the stages without a backward are the first ones.
    """
    depth = -1
    while (depth + 1, microbatch) in flow.forwards:
        depth += 1
    last = pipeline.active_stages - 1
    dropped = [s for s in range(depth + 1) if Action(s, Op.DROP, microbatch) in places]
    for stage in range(depth + 1):
        if stage in dropped:
            _check_dropped(schedule.rank_of(stage), stage, microbatch, places)
        else:
            _check_whole(schedule.rank_of(stage), stage, microbatch, places, pipeline)
    beyond = any(Action(stage, op, microbatch) in places for stage in range(depth + 1, last + 1) for op in COMPUTES)
    partial = 0 <= depth < last and not dropped and not pipeline.tuning and depth in pipeline.heads
    if beyond or not (depth == last or partial):
        raise ScheduleError(
            f"rank {schedule.rank_of(depth + 1)}: action {depth + 1}F{microbatch} is missing: a microbatch goes from "
            f"stage to stage to the last, or as a filler back from a stage with exits"
        )
    if dropped != list(range(len(dropped))) or len(dropped) > last:
        raise ScheduleError(
            f"microbatch {microbatch} is dropped on stages {dropped}: only the first stages may drop one, and the last "
            f"stage never does"
        )


def _check_dropped(rank: int, stage: int, microbatch: int, places: Places) -> None:
    for op in (Op.HEADS, Op.BACKWARD, Op.INPUT, Op.WEIGHT):
        action = Action(stage, op, microbatch)
        if action in places:
            raise ScheduleError(
                f"rank {rank}, position {places[action][1]}: {action}, but {stage}D{microbatch} drops the microbatch "
                f"there: remove one of the two"
            )


def _check_whole(rank: int, stage: int, microbatch: int, places: Places, pipeline: Pipeline) -> None:
    """A stage that has a forward has heads where there are any, and one backward, in one or two parts."""
    found = {op for op in COMPUTES if Action(stage, op, microbatch) in places}
    wanted = {Op.FORWARD} | ({Op.HEADS} if stage in pipeline.heads else set())
    if not pipeline.tuning:
        wanted |= {Op.INPUT, Op.WEIGHT} if found & {Op.INPUT, Op.WEIGHT} else {Op.BACKWARD}
    for op in sorted(wanted - found):
        raise ScheduleError(f"rank {rank}: action {stage}{op.value}{microbatch} is missing")
    for op in sorted(found - wanted):
        action = Action(stage, op, microbatch)
        why = "stage has no heads" if op is Op.HEADS else "microbatch has another backward there, or needs none"
        raise ScheduleError(f"rank {rank}, position {places[action][1]}: {action} is too much: the {why}")


def _check_order(flow: Flow, places: Places) -> None:
    """Each action after those of its own rank that it builds on."""
    for action, (rank, position) in places.items():
        for earlier in _builds_on(action, flow):
            there = places.get(earlier)
            if there and there[0] == rank and there[1] > position:
                raise ScheduleError(f"rank {rank}, position {position}: {action} stands before {earlier}: swap them")


def _builds_on(action: Action, flow: Flow) -> list[Action]:
    """What must have run before `action` if it is on the same rank."""
    stage, op, microbatch = action
    earlier: list[Op] = []
    if op in (Op.HEADS, Op.SEND_F):
        earlier = [Op.FORWARD]
    elif op in BACKWARDS:
        earlier = [Op.FORWARD, Op.HEADS, Op.SEND_F]
    elif op is Op.DROP:
        earlier = [Op.FORWARD, Op.SEND_F]
    elif op is Op.WEIGHT:
        earlier = [Op.INPUT]
    elif op is Op.SEND_B:
        earlier = [Op.BACKWARD, Op.INPUT]
    needed = [Action(stage, before, microbatch) for before in earlier]
    message = flow.needs(action)
    if message:
        neighbour = other_end(message).stage
        makers = (Op.FORWARD,) if op is Op.FORWARD else (Op.BACKWARD, Op.INPUT)
        needed += [message, *(Action(neighbour, maker, microbatch) for maker in makers)]
    return needed


def _check_messages(schedule: Schedule, flow: Flow, places: Places) -> None:
    """The messages are exactly those that the computes need."""
    needed = set()
    for action in chain.from_iterable(schedule.computes()):
        send = flow.makes(action)
        if send and schedule.rank_of(send.stage) != schedule.rank_of(other_end(send).stage):
            needed |= {send, other_end(send)}
    for message in sorted(needed - places.keys()):
        raise ScheduleError(f"rank {schedule.rank_of(message.stage)}: action {message} is missing")
    for action, (rank, position) in places.items():
        if (action.op in SENDS or action.op in RECEIVES) and action not in needed:
            raise ScheduleError(f"rank {rank}, position {position}: {action} is too much: nobody needs that message")


def _check_queues(schedule: Schedule) -> None:
    """Between two ranks, receives are posted in the order of the sends."""
    sent: dict[tuple[int, int], list[Action]] = {}
    posted: dict[tuple[int, int], list[Action]] = {}
    for rank, actions in enumerate(schedule):
        for action in actions:
            if action.op in SENDS:
                sent.setdefault((rank, schedule.rank_of(other_end(action).stage)), []).append(other_end(action))
            elif action.op in RECEIVES:
                posted.setdefault((schedule.rank_of(other_end(action).stage), rank), []).append(action)
    for (source, target), messages in sent.items():
        for expected, found in zip(messages, posted[source, target], strict=True):
            if expected != found:
                position = schedule[target].index(found)
                raise ScheduleError(
                    f"rank {target}, position {position}: {found} is posted, but the next message from rank {source} "
                    f"is that of {expected}: post receives in the order of the sends"
                )


def _check_reductions(
    schedule: Schedule, places: Places, buckets: Mapping[int, int], head_buckets: Mapping[int, int]
) -> None:
    """Each bucket is reduced once, after the last action that adds to it."""
    wanted = {}
    for stage in {*buckets, *head_buckets}:
        layers = buckets.get(stage, 0)
        for bucket in range(layers + head_buckets.get(stage, 0)):
            wanted[Action(stage, Op.REDUCE, bucket)] = bucket >= layers
    for action, (rank, position) in places.items():
        if action.op is Op.REDUCE and action not in wanted:
            raise ScheduleError(f"rank {rank}, position {position}: {action} reduces a bucket that is not there")
    for action, of_heads in wanted.items():
        rank = schedule.rank_of(action.stage)
        if action not in places:
            raise ScheduleError(f"rank {rank}: action {action} is missing")
        for later in schedule[rank][places[action][1] :]:
            if later.stage == action.stage and adds_gradients(later, of_heads):
                here = f"rank {rank}, position {places[action][1]}: {action}"
                raise ScheduleError(f"{here} stands before {later}, which adds to the bucket: move it behind")


def adds_gradients(action: Action, heads_only: bool) -> bool:
    """Whether `action` adds to the gradients of its stage's weights, or of its heads' only."""
    return action.op is Op.HEADS or (not heads_only and action.op in (Op.BACKWARD, Op.WEIGHT))


def _check_memory(schedule: Schedule, pipeline: Pipeline, limit: int | Sequence[int]) -> None:
    limits = [limit] * pipeline.num_ranks if isinstance(limit, int) else list(limit)
    for rank, (most, allowed) in enumerate(zip(most_in_flight(schedule), limits, strict=True)):
        if most > allowed:
            raise ScheduleError(
                f"rank {rank} holds the activations of {most} microbatches at a time, allowed are {allowed}: "
                f"run fewer forwards ahead of their backwards"
            )
