"""Hostile files in every place that reads one: nothing in them runs, each is refused by name, in bounded time and
memory (row R13)."""

import functools
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from megatron.checkpoint import manifest
from tests.unit.checkpoint.hostile.places import NATIVE, PLACES, assert_refused, link_to_copy, read_whole, spoilt
from tests.unit.checkpoint.hostile.traps import TRAPS
from tests.unit.checkpoint.hostile.watch import watched
from tests.unit.checkpoint.pickles import (
    BODIES,
    PAYLOADS,
    pickled,
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches a forked process through Linux's /proc")


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """With a plain pickle reader each of them does what it is here for, and it is seen."""
    actions = {name: functools.partial(pickle.loads, pickled(name, tmp_path / "mark")) for name in PAYLOADS | BODIES}
    outcomes = watched(actions)
    assert len(outcomes) >= 20
    assert [name for name, outcome in outcomes.items() if not outcome.done] == ["behind the end"]


def test_the_child_tells_how_it_ended() -> None:
    outcomes = watched({
        "fine": lambda: None,
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "failed": lambda: 1 / 0,
        "large": lambda: (b"x" * (50 << 20)).count(b"y"),
    })  # fmt: skip
    assert [outcome.error for outcome in outcomes.values()] == ["", "SIGKILL", "ZeroDivisionError", ""]
    assert 45 < outcomes["large"].megabytes < 60 and outcomes["fine"].megabytes < 5


@pytest.mark.parametrize("name", PLACES)
def test_no_payload_runs_anywhere(good: Path, tmp_path: Path, name: str) -> None:
    place, actions = PLACES[name], {}
    for payload in PAYLOADS | BODIES:
        (tmp_path / payload).mkdir()
        content = place.wrap(pickled(payload, tmp_path / payload / "mark"))
        root = spoilt(good, tmp_path / payload, place, lambda path, content=content: path.write_bytes(content))
        actions[payload] = functools.partial(place.read, root)
    for payload, outcome in watched(actions).items():
        assert_refused(outcome, place, tmp_path / payload, payload)
        assert not (tmp_path / payload / "mark").exists()


@pytest.mark.parametrize("name", TRAPS)
def test_traps_and_bombs_are_refused_soon(good: Path, tmp_path: Path, name: str) -> None:
    place, actions = PLACES[name], {}
    for trap, make in TRAPS[name].items():
        here = tmp_path / str(len(actions))
        root = spoilt(good, here, place, lambda path, make=make: path.write_bytes(make(path.read_bytes())))
        actions[trap] = functools.partial(place.read, root)
    for number, (trap, outcome) in enumerate(watched(actions).items()):
        assert_refused(outcome, place, tmp_path / str(number), trap)


# --- what is no ordinary file


def hole(path: Path, content: bytes) -> None:
    """8 GB that take no disk."""
    with open(path, "wb") as file:
        file.truncate(8 << 30)


STRANGE: dict[str, Callable[[Path, bytes], object]] = {
    "a pipe": lambda path, content: os.mkfifo(path),
    "a link to an endless device": lambda path, content: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path, content: path.symlink_to("nowhere"),
    "a link to itself": lambda path, content: path.symlink_to(path.name),
    "a directory": lambda path, content: path.mkdir(),
    "a hole of 8 GB": hole,
    "a link to its copy": link_to_copy,
}
WHOLE = {
    name: replace(PLACES[name], read=read_whole, named=NATIVE, after=lambda root: None)
    for name in ("manifest", "facts", "index", "tensors", "own tokenizer")
}
KEPT_BY_NAME = {"tracker": PLACES["tracker"], "megatron": PLACES["megatron"]}


@pytest.mark.parametrize("name", WHOLE | KEPT_BY_NAME)
def test_no_pipe_device_or_link_is_read(good: Path, tmp_path: Path, name: str) -> None:
    place, actions = (WHOLE | KEPT_BY_NAME)[name], {}
    for kind, make in STRANGE.items():
        if kind == "a link to its copy" and name in ("manifest", *KEPT_BY_NAME):
            continue  # no manifest vouches for those, and people do link large files

        def replaced(path: Path, make: Callable = make) -> None:
            content = path.read_bytes()
            path.unlink()
            make(path, content)

        actions[kind] = functools.partial(place.read, spoilt(good, tmp_path / kind / "a" / "b", place, replaced))
    for kind, outcome in watched(actions).items():
        assert_refused(outcome, place, tmp_path / kind / "a" / "b", kind)


def test_a_pipe_that_the_manifest_lists_is_not_waited_for(good: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(good / "native", tmp_path / "native") / "iter_0000005"
    os.mkfifo(directory / "pipe")
    entries = json.loads((directory / "manifest.json").read_text())["files"]
    entries["pipe"] = {"sha256": sha256(b"").hexdigest(), "size": 0}
    (directory / "manifest.json").write_bytes(manifest._encode(entries))
    (outcome,) = watched({"pipe": functools.partial(read_whole, tmp_path)}).values()
    assert_refused(outcome, WHOLE["manifest"], tmp_path, "pipe")


def test_directories_without_end(good: Path, tmp_path: Path) -> None:
    inside = shutil.copytree(good / "native", tmp_path / "native") / "iter_0000005"
    made = []
    for _ in range(1200):
        inside = inside / "d"
        inside.mkdir()
        made.append(inside)
    (outcome,) = watched({"deep": functools.partial(read_whole, tmp_path)}).values()
    for path in reversed(made):  # nobody else can
        path.rmdir()
    assert_refused(outcome, WHOLE["manifest"], tmp_path, "deep")
