"""A save that is killed, or meets a full or read-only disk, at every single one of its file operations (R5, R7)."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron import faults
from megatron.checkpoint import native
from megatron.checkpoint.find import TRACKER, recognise
from megatron.checkpoint.state import RunState
from megatron.errors import StorageError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OLD, NEW = 5, 6


def state(value: float) -> RunState:
    tensors = {f"model/layers.{i}.weight": torch.full((16, 16), value + i) for i in range(3)}
    return RunState(tensors, {"consumed_samples": int(value)})


def save(root: Path, iteration: int, value: float) -> None:
    words = root.parent / "vocab.json"
    words.write_text("{}")
    native.save(root, iteration, state(value), [words])


def cluttered(root: Path) -> None:
    """An older checkpoint, and what killed saves leave: one moved aside and never replaced, a half, a half file."""
    save(root, 3, 3)
    save(root, 4, 4)
    (root / "iter_0000004").rename(root / f"iter_0000004.replaced-{'0' * 32}")
    save(root, OLD, 1)
    shutil.copytree(root / "iter_0000003", root / f"iter_0000006.staging-{'1' * 32}")
    (root / "iter_0000004").rename(root / f"iter_0000004.replaced-{'0' * 32}")
    (root / f"config.yaml.{'2' * 32}.tmp").write_text("half")


def save_and_tidy(root: Path) -> None:
    """A save that meets clutter, and prunes."""
    save(root, NEW, 2)
    native.prune(root, 2, NEW)


def points(root: Path, action: Callable[[Path], None]) -> list[str]:
    """The file operations that `action` takes."""
    with faults.armed() as names:
        action(root)
    return names


def killed(action: Callable[[], None], words: str) -> bool:
    """Run `action` in a child process with armed faults; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            with faults.armed(words):
                action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def assert_whole(root: Path, allowed: dict[int, list[float]]) -> None:
    """What is found is one of the two saves, all of it."""
    found = recognise(root)
    loaded = native.read(found.directory)
    value = float(loaded.facts["consumed_samples"])
    assert value in allowed[found.iteration]
    expected = state(value).tensors
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
    assert list(native.tokenizer_files(found.directory)) == ["vocab.json"]


@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
def test_killed_before_every_file_operation(tmp_path: Path, iteration: int) -> None:
    save(tmp_path / "count", OLD, 1)
    count = len(points(tmp_path / "count", lambda root: save(root, iteration, 2)))
    assert count > 15
    for number in range(1, count + 1):
        root = tmp_path / str(number)
        save(root, OLD, 1)
        assert killed(lambda root=root: save(root, iteration, 2), f"@{number}:die")
        assert_whole(root, {OLD: [1.0, 2.0], NEW: [2.0]} if iteration == NEW else {OLD: [1.0, 2.0]})
        save(root, 7, 3)
        expected = {f"iter_{i:07d}" for i in (OLD, 7)} | {TRACKER}
        assert {path.name for path in root.iterdir()} - {"iter_0000006"} == expected
        assert_whole(root, {7: [3.0]})


@pytest.mark.parametrize("fault", ["enospc", "erofs"])
@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
def test_a_disk_that_refuses_every_file_operation(tmp_path: Path, iteration: int, fault: str) -> None:
    failed = 0
    save(tmp_path / "count", OLD, 1)
    for number, name in enumerate(points(tmp_path / "count", lambda root: save(root, iteration, 2)), 1):
        root = tmp_path / str(number)
        save(root, OLD, 1)
        try:
            with faults.armed(f"@{number}:{fault}"):
                save(root, iteration, 2)
        except StorageError:
            failed += 1
        assert_whole(root, {OLD: [1.0, 2.0], NEW: [2.0]})
        if name == "commit.drop_replaced":  # all but that was done; the next save sweeps it
            save(root, iteration, 2)
        assert not {path.name for path in root.iterdir()} - {TRACKER, "iter_0000005", "iter_0000006"}
    assert failed > 15


def test_killed_or_refused_while_it_tidies_up(tmp_path: Path) -> None:
    """What a killed save left is put back or swept, older checkpoints are pruned: each step may fail or be the last."""
    cluttered(tmp_path / "count")
    names = points(tmp_path / "count", save_and_tidy)
    tidying = {"commit.put_back", "commit.sweep", "commit.sweep_file", "commit.remove", "commit.empty"}
    assert tidying <= set(names)
    for number in [number for number, name in enumerate(names, 1) if name in tidying]:
        for fault in ("die", "erofs"):
            root = tmp_path / f"{number} {fault}"
            cluttered(root)
            assert killed(lambda root=root: save_and_tidy(root), f"@{number}:{fault}") == (fault == "die")
            assert_whole(root, {OLD: [1.0], NEW: [2.0]})
            before = recognise(root).directory.name
            save(root, 7, 7)
            native.prune(root, 2, 7)
            assert {path.name for path in root.iterdir()} == {before, "iter_0000007", TRACKER}
            assert_whole(root, {7: [7.0]})


def test_leftovers_are_swept_before_anything_is_written(tmp_path: Path) -> None:
    """On a nearly full disk they would leave no room for it."""
    cluttered(tmp_path / "run")
    names = points(tmp_path / "run", lambda root: save(root, NEW, 2))
    assert max(names.index("commit.sweep"), names.index("commit.put_back")) < names.index("commit.make")


def killed_within(root: Path, iteration: int, seconds: float | None) -> bool:
    """A child that has begun to save (and prunes after it) is killed after that time; whether it was still at it."""
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(begin, b".")
            save(root, iteration, float(iteration))
            native.prune(root, 2, iteration)
        finally:
            os._exit(0)
    os.close(begin)
    os.read(begun, 1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(begun)
    return code == -signal.SIGKILL


def kill_at_random(root: Path, hits: int, draw: random.Random) -> None:
    """Until so many kills have met a save: what is found is step k, or the one that was found before, and whole."""
    save(root, 1, 1)
    begin = time.monotonic()
    for iteration in range(2, 7):
        assert not killed_within(root, iteration, None)
    seconds = (time.monotonic() - begin) / 5
    while hits:
        iteration, before = iteration + 1, recognise(root).iteration
        killed = killed_within(root, iteration, draw.uniform(0, seconds))
        hits -= killed
        found = recognise(root).iteration
        assert found in ((before, iteration) if killed else (iteration,))
        assert_whole(root, {found: [float(found)]})
    save(root, iteration + 1, 1)
    assert not [path for path in root.iterdir() if "-" in path.name or path.name.endswith(".tmp")]


@pytest.fixture
def in_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor in a file of its own."""
    monkeypatch.setattr("megatron.checkpoint.dcp_files._FULL_FILE", 1 << 10)


@pytest.mark.usefixtures("in_many_files")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "run", 10, random.Random(1))
    assert len(list((recognise(tmp_path / "run").directory / "tensors").glob("*.distcp"))) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("in_many_files")
def test_killed_at_200_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "run", 200, random.Random(2))
