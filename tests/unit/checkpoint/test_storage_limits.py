"""Saves that real storage refuses, rather than an injected fault: limits on file sizes, a full disk, one that is
read-only or slow, directories that vanish (row R7).

What must hold each time: a StorageError that names the checkpoint, the older one intact, and no leftovers once a save
has succeeded again.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron import faults
from megatron.checkpoint import native
from megatron.checkpoint.find import TRACKER, recognise, recognise_if_any
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.state import RunState
from megatron.cli import pretrain
from megatron.errors import CheckpointError, ConfigError, StorageError
from megatron.parallel.backend import Backend
from megatron.testing.corpus import training_flags, write_corpus

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OLD, NEW, LATER = 5, 6, 7
CPU = Backend.choose("gloo")
MOUNT_FLAGS = {"rw": 0, "ro": 1}
REMOUNT, PRIVATE_AND_BELOW, NEW_MOUNTS = 1 << 5, (1 << 18) | (1 << 14), 0x00020000  # of Linux's mount and unshare


def state(value: float) -> RunState:
    tensors = {f"model/layers.{i}.weight": torch.full((64, 64), float(value + i)) for i in range(3)}
    return RunState(tensors, {"consumed_samples": int(value)})


def save(root: Path, iteration: int, value: float) -> Path:
    words = root.parent / f"{root.name} vocab.json"
    if not words.exists():
        words.write_text("{}")
    return native.save(root, iteration, state(value), [words])


def assert_whole(root: Path, iteration: int, value: float) -> None:
    """This is what a run would load, all of it."""
    found = recognise(root)
    loaded = native.read(found.directory)
    assert (found.iteration, loaded.facts["consumed_samples"]) == (iteration, int(value))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in state(value).tensors.items())


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def assert_refused_without_a_trace(root: Path, iteration: int) -> None:
    """A save of value 2 fails, the old one of value 1 is there and nothing else."""
    with pytest.raises(StorageError, match=f"cannot write .*iter_{iteration:07d}"):
        save(root, iteration, 2)
    assert_whole(root, OLD, 1)
    assert names(root) == {"iter_0000005", TRACKER}


def in_child(action: Callable[[], None]) -> int:
    """Do something in a child process, where limits can be set for good; its exit code, or minus a signal."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                action()
                code = 0
            except BaseException:  # noqa: BLE001 - goes to the parent
                traceback.print_exc(file=said)
                said.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        assert code != 1, said.read()
    return code


# --- limits on the size of a file -------------------------------------------------------------------------------


def limits(tmp_path: Path) -> list[int]:
    """One below the size of each file of a checkpoint, and some within the largest."""
    save(tmp_path / "count", OLD, 1)
    sizes = sorted({path.stat().st_size for path in (tmp_path / "count" / "iter_0000005").rglob("*") if path.is_file()})
    assert len(sizes) == 5
    return [0, *(size - 1 for size in sizes), *(sizes[-1] * part // 8 for part in range(1, 8))]


@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
def test_files_that_may_not_grow(tmp_path: Path, iteration: int) -> None:
    def refused(root: Path, limit: int) -> None:
        """Python ignores the signal: writing fails with EFBIG, at times after a part was written."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            assert_refused_without_a_trace(root, iteration)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    for number, limit in enumerate(limits(tmp_path)):
        root = tmp_path / str(number)
        save(root, OLD, 1)
        assert in_child(lambda root=root, limit=limit: refused(root, limit)) == 0
        save(root, LATER, 3)
        assert_whole(root, LATER, 3)


@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
def test_the_signal_of_the_limit_kills(tmp_path: Path, iteration: int) -> None:
    def killed(root: Path, limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        save(root, iteration, 2)

    for number, limit in enumerate(limits(tmp_path)):
        root = tmp_path / str(number)
        save(root, OLD, 1)
        assert in_child(lambda root=root, limit=limit: killed(root, limit)) == -signal.SIGXFSZ
        assert_whole(root, OLD, 1)
        save(root, LATER, 3)
        assert_whole(root, LATER, 3)
        assert names(root) == {"iter_0000005", "iter_0000007", TRACKER}


def test_a_run_ends_after_three_refusals_and_says_so(tmp_path: Path) -> None:
    """The limit lets pass what is small: caches, the status, the metrics."""
    corpus, metrics = write_corpus(tmp_path / "corpus"), tmp_path / "metrics.jsonl"
    flags = training_flags(corpus, tmp_path / "cache", save=tmp_path / "save", save_interval=3, metrics_file=metrics)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        os._exit(pretrain.main(flags))

    assert in_child(run) == StorageError.exit_code == 5
    status = json.loads((tmp_path / "save" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["iteration"]) == ("ended", 5, 9)
    assert "iter_0000009" in status["reason"] and "File too large" in status["reason"]
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["iteration"] for step in steps if "loss/final" in step][-1] == 9
    assert not [name for name in names(tmp_path / "save") if name.startswith("iter_")]


# --- disks of one's own -----------------------------------------------------------------------------------------


class Disk:
    """A small file system in memory that only this process sees; needs Linux and the right to mount."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._system = path, ctypes.CDLL(None, use_errno=True)
        path.mkdir()
        self._do(self._system.unshare(NEW_MOUNTS))
        self._do(self._system.mount(b"none", b"/", None, PRIVATE_AND_BELOW, None))
        self._mount(0, f"size={size}")

    def remount(self, how: str) -> None:
        """Make it "ro" or "rw"."""
        self._mount(REMOUNT | MOUNT_FLAGS[how], None)

    def room(self) -> int:
        """Bytes that are free."""
        figures = os.statvfs(self.path)
        return figures.f_bavail * figures.f_frsize

    def _mount(self, flags: int, options: str | None) -> None:
        data = options.encode() if options else None
        self._do(self._system.mount(b"none", os.fsencode(self.path), b"tmpfs", flags, data))

    def _do(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture
def on_a_disk(tmp_path: Path) -> Callable[[int, Callable[[Disk], None]], None]:
    """`on_a_disk(size, action)` does something with a disk of its own, in a child process."""
    if sys.platform != "linux":
        pytest.skip("mounts a disk as Linux does")

    def refused() -> None:
        try:
            Disk(tmp_path / "probe", 1 << 16)
        except OSError:
            os._exit(77)

    if in_child(refused) == 77:
        pytest.skip("this user may not mount a disk")
    return lambda size, action: in_child(lambda: action(Disk(tmp_path / "disk", size)))


@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
def test_a_disk_that_is_full_at_any_moment(on_a_disk: Callable, iteration: int) -> None:
    """A checkpoint takes some 80 kB, in pages; with less room than that, whatever it is, nothing is lost."""

    def fill(disk: Disk) -> None:
        root, refused = disk.path / "save", 0
        save(root, OLD, 1)
        needed = disk.room()
        save(root, NEW, 1)
        needed -= disk.room()
        shutil.rmtree(root / "iter_0000006")
        for room in range(0, needed, 4096):
            save(root, OLD, 1)
            (disk.path / "filler").write_bytes(bytes(disk.room() - room))
            assert_refused_without_a_trace(root, iteration)
            refused += 1
            (disk.path / "filler").unlink()
        save(root, LATER, 3)
        assert_whole(root, LATER, 3)
        assert refused > 10

    on_a_disk(1 << 19, fill)


def test_what_a_killed_save_left_makes_room_before_the_next(on_a_disk: Callable) -> None:
    """Two of them don't fit."""

    def killed(disk: Disk) -> None:
        root = disk.path / "save"
        save(root, OLD, 1)
        shutil.copytree(root / "iter_0000005", root / f"iter_0000006.staging-{'1' * 32}")
        (disk.path / "filler").write_bytes(bytes(disk.room() - 8192))
        save(root, NEW, 2)
        assert_whole(root, NEW, 2)
        assert names(root) == {"iter_0000005", "iter_0000006", TRACKER}

    on_a_disk(1 << 19, killed)


def test_a_disk_that_turns_read_only(on_a_disk: Callable) -> None:
    def turn(disk: Disk) -> None:
        root = disk.path / "save"
        save(root, OLD, 1)
        for iteration in (OLD, NEW):
            disk.remount("ro")
            with pytest.raises(StorageError, match=f"iter_{iteration:07d}: .*Read-only file system"):
                native.save(root, iteration, state(2))
            assert_whole(root, OLD, 1)
            disk.remount("rw")
        save(root, LATER, 3)
        assert_whole(root, LATER, 3)
        assert names(root) == {"iter_0000005", "iter_0000007", TRACKER}

    on_a_disk(1 << 19, turn)


# --- permissions, slowness, tidy neighbours ---------------------------------------------------------------------


@pytest.fixture
def others_root() -> Iterator[Path]:
    """A directory that everybody may pass through, unlike pytest's."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory) / "save"


def test_a_directory_without_permission_to_write(others_root: Path) -> None:
    save(others_root, OLD, 1)
    os.chmod(others_root, 0o555)

    def refused() -> None:
        if os.geteuid() == 0:  # who may do everything
            os.seteuid(65534)
        for iteration in (OLD, NEW):
            with pytest.raises(StorageError, match=f"iter_{iteration:07d}: .*Permission denied"):
                native.save(others_root, iteration, state(2))
        assert_whole(others_root, OLD, 1)

    assert in_child(refused) == 0
    os.chmod(others_root, 0o755)
    save(others_root, LATER, 3)
    assert names(others_root) == {"iter_0000005", "iter_0000007", TRACKER}


SLOW = "tensors.write:delay=0.003 commit.flush:delay=0.02 native.facts:delay=0.02 file.flush:delay=0.02"


@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
def test_a_slow_disk_loses_nothing_and_shows_no_halves(tmp_path: Path, iteration: int) -> None:
    """Who looks while the save goes on finds the old one or the new one, each whole."""
    root = tmp_path / "save"
    save(root, OLD, 1)
    with faults.armed(f"{SLOW} commit.rename:delay=0.2 commit.drop_replaced:delay=0.1"):
        saver = threading.Thread(target=save, args=(root, iteration, 2))
        began, seen = time.monotonic(), []
        saver.start()
        while saver.is_alive():
            with contextlib.suppress(CheckpointError, FileNotFoundError):  # it was renamed while it was read
                loaded = native.read(recognise(root).directory)
                seen.append(loaded.facts["consumed_samples"])
                expected = state(seen[-1]).tensors
                assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
            time.sleep(0.005)
        saver.join()
    assert time.monotonic() - began > 0.4
    assert seen == sorted(seen) and seen[0] == 1 and len(seen) > 10
    assert_whole(root, iteration, 2)
    assert names(root) == {"iter_0000005", f"iter_{iteration:07d}", TRACKER}


def test_a_slow_asynchronous_save_writes_what_was_when_it_began(tmp_path: Path) -> None:
    """The run goes on meanwhile and changes every tensor; the next copy is taken into the same memory."""
    live = state(1).tensors
    snapshot = Snapshot(live, CPU)
    for value in (1, 2):
        taken = snapshot.take(live)
        with faults.armed(SLOW):
            saver = threading.Thread(
                target=native.save, args=(tmp_path, value, RunState(taken, {"consumed_samples": value}))
            )
            saver.start()
            while saver.is_alive():
                for tensor in live.values():
                    tensor += 0.25
                time.sleep(0.002)
            saver.join()
        assert not torch.equal(live["model/layers.0.weight"], state(value).tensors["model/layers.0.weight"])
        assert_whole(tmp_path, value, value)
        for name, tensor in state(value + 1).tensors.items():
            live[name].copy_(tensor)


def test_memory_that_cannot_be_had_is_said_before_the_first_step() -> None:
    def refused() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        with pytest.raises(ConfigError, match=r"--async-save holds a copy .*, 0.3 GB here, .* leave it out"):
            Snapshot({"model/a": torch.empty(1, dtype=torch.uint8).expand(300 << 20)}, CPU)

    if not Path("/proc/self/statm").exists():
        pytest.skip("limits memory as Linux counts it")
    assert in_child(refused) == 0


class Tidier:
    """Somebody who removes directories that he takes for rubbish, just before one of a save's file operations."""

    def __init__(self, root: Path, pattern: str, when: int) -> None:
        self.root, self.pattern, self.when, self.passed = root, pattern, when, 0
        self._point = faults.point

    def __call__(self, name: str) -> None:
        self.passed += 1
        if self.passed == self.when:
            for path in self.root.parent.glob(self.pattern):
                shutil.rmtree(path)
        self._point(name)


VANISHING = {
    "the root": "save",
    "what is being written": "save/*.staging-*",
    "its tensors": "save/*.staging-*/tensors",
    "its tokenizer": "save/*.staging-*/tokenizer",
}


@pytest.mark.parametrize("iteration", [OLD, NEW], ids=["same iteration", "next iteration"])
@pytest.mark.parametrize("what", VANISHING)
def test_directories_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, iteration: int) -> None:
    """A save says that it failed, or what it wrote is whole; where the old one was not touched it is still there.

    Once the manifest is being made nobody need notice: then the new one is found damaged, as if removed later.
    """
    outcomes = set()
    with faults.armed() as passed:
        save(tmp_path / "count", iteration, 2)
    writes = [number for number, name in enumerate(passed, 1) if name == "tensors.write"]
    moments = sorted({*range(1, len(passed) + 1)} - {*writes[2:-2]})
    tensors_written = len(passed) - passed[::-1].index("tensors.rename")
    for when in moments:
        root = tmp_path / str(when) / "save"
        root.parent.mkdir()
        save(root, OLD, 1)
        with monkeypatch.context() as patched, faults.armed():
            patched.setattr(faults, "point", Tidier(root, VANISHING[what], when))
            try:
                save(root, iteration, 2)
                outcomes.add("saved")
            except StorageError:
                outcomes.add("failed")
        if what == "the root":
            assert recognise_if_any(root) is None or native.read(recognise(root).directory).tensors
        elif when <= tensors_written:
            assert_some(root, {(OLD, 1), (iteration, 2)}, f"{when}: {passed[when - 1]}")
        save(root, LATER, 3)
        assert_whole(root, LATER, 3)
        assert not [name for name in names(root) if "staging" in name or "replaced" in name]
    assert outcomes == {"saved", "failed"}


def assert_some(root: Path, allowed: set[tuple[int, int]], what: str) -> None:
    found = recognise(root)
    loaded = native.read(found.directory)
    assert (found.iteration, loaded.facts["consumed_samples"]) in allowed, what
    assert list(native.tokenizer_files(found.directory)), what
