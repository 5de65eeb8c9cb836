"""Named fault points: places where tests make a run die, fail or wait. Unarmed they do nothing.

`EE_LLM_FAULTS` arms them for a whole process, `armed` for a block: words separated by blanks, each `NAME:ACTION` (every
passing of that point), `NAME@N:ACTION` (its Nth, from 1) or `@N:ACTION` (the Nth passing of any point). Actions: `die`
(SIGKILL), `raise`, `enospc`, `erofs`, `delay=SECONDS`.
"""

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any


class InjectedFault(RuntimeError):
    """What the action `raise` raises."""


@dataclass(eq=False)
class _Plan:
    """What is armed, and how often each point was passed since ("" counts all together)."""

    arms: list[tuple[str, int, str]]
    passed: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


def point(name: str) -> None:
    """Pass a named point."""
    if _plans:
        _meet(_plans[-1], name)


def watched(stream: Any, name: str) -> Any:
    """`stream`, with a point before each of its writes; itself where nothing is armed."""
    return _Watched(stream, name) if _plans else stream


class _Watched:
    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, content: Any) -> int:
        point(self._name)
        return self._stream.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def armed(words: str = "") -> Iterator[list[str]]:
    """Arm the points that `words` name within the block; yields the names of all points passed in it, in order."""
    plan = _parse(words)
    _plans.append(plan)
    try:
        yield plan.names
    finally:
        _plans.remove(plan)


def _meet(plan: _Plan, name: str) -> None:
    with plan.lock:
        plan.names.append(name)
        plan.passed.update((name, ""))
        actions = [
            action
            for wanted, number, action in plan.arms
            if wanted in (name, "") and number in (0, plan.passed[wanted])
        ]
    for action in actions:
        _act(action, name)


def _act(action: str, name: str) -> None:
    kind, _, value = action.partition("=")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "delay":
        time.sleep(float(value))
    elif kind in ("enospc", "erofs"):
        number = getattr(errno, kind.upper())
        raise OSError(number, os.strerror(number))
    else:
        raise InjectedFault(name)


def _parse(words: str) -> _Plan:
    arms = []
    for word in words.split():
        place, colon, action = word.partition(":")
        name, _, number = place.partition("@")
        assert colon and action.partition("=")[0] in ("die", "raise", "enospc", "erofs", "delay"), word
        arms.append((name, int(number or 0), action))
    return _Plan(arms)


_plans: list[_Plan] = [_parse(os.environ["EE_LLM_FAULTS"])] if os.environ.get("EE_LLM_FAULTS") else []
