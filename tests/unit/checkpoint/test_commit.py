"""How a directory or file appears, disappears and is swept: as a whole, on disk, and nothing else is touched."""

import os
from pathlib import Path

import pytest

from megatron import faults
from megatron.checkpoint import commit, manifest
from megatron.errors import StorageError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_appears_with_everything_in_it(tmp_path):
    final = tmp_path / "new" / "iter_0000001"
    with commit.staged(final) as staged:
        assert staged.path.parent == final.parent and staged.path.name.startswith("iter_0000001.staging-")
        (staged.path / "deep").mkdir()
        (staged.path / "deep" / "file").write_text("x")
        assert not final.exists()
    assert names(final.parent) == ["iter_0000001"]
    assert (final / "deep" / "file").read_text() == "x"


def test_a_failure_leaves_the_old_one_and_no_leftovers(tmp_path):
    final = tmp_path / "it"
    with commit.staged(final) as staged:
        (staged.path / "a").write_text("old")
    with pytest.raises(RuntimeError), commit.staged(final) as staged:
        (staged.path / "a").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["it"]
    assert (final / "a").read_text() == "old"


def test_a_replacement_takes_over_as_a_whole(tmp_path):
    final = tmp_path / "it"
    for content in ("a", "b"):
        with commit.staged(final) as staged:
            (staged.path / content).write_text(content)
    assert names(tmp_path) == ["it"]
    assert names(final) == ["b", "manifest.json"]


@pytest.mark.parametrize("existing", [True, False])
def test_the_old_one_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, monkeypatch, existing):
    final = tmp_path / "it"
    if existing:
        with commit.staged(final) as staged:
            (staged.path / "a").write_text("old")
    rename = Path.rename

    def refuse_staging(path, target):
        if ".staging-" in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_staging)
    with pytest.raises(StorageError, match="Permission denied"), commit.staged(final) as staged:
        (staged.path / "a").write_text("new")
    assert names(tmp_path) == (["it"] if existing else [])
    assert not existing or (final / "a").read_text() == "old"


def test_a_staging_directory_that_vanishes_is_an_error(tmp_path):
    with pytest.raises(StorageError, match="cannot write"), commit.staged(tmp_path / "it") as staged:
        staged.path.rename(tmp_path / "gone")


def test_moved_aside_names_are_recognised(tmp_path):
    assert commit.set_aside(tmp_path / f"iter_0000001.replaced-{'0' * 32}") == "iter_0000001"
    assert commit.set_aside(tmp_path / "iter_0000001") is None
    assert commit.set_aside(tmp_path / "iter_0000001.replaced-x") is None


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "tracker.txt"
    commit.replace_file(path, "1\n")
    commit.replace_file(path, "2\n")
    assert path.read_text() == "2\n"
    assert names(tmp_path) == ["tracker.txt"]


def test_errors_of_the_disk_are_storage_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"), commit.staged(tmp_path / "file" / "it"):
        pass
    with pytest.raises(StorageError, match="tracker"):
        commit.replace_file(tmp_path / "nowhere" / "tracker", "1")


UNIQUE = "0123456789abcdef" * 2
SWEPT = {
    f"iter_0000001.staging-{UNIQUE}", f"iter_0000002.removed-{UNIQUE}", f"config.yaml.{UNIQUE}.tmp",
    f"latest_checkpointed_iteration.txt.{UNIQUE}.tmp", f"run_status.json.{UNIQUE}.tmp",
}  # fmt: skip
OTHERS = {
    "iter_0000001", f"iter_0000001.kept-{UNIQUE}", f"iter_0000001.staging-{UNIQUE}.old",
    f"iter_0000001.staging-{UNIQUE}0", "iter_0000001.staging-", "iter_0000001.removed-1", f".staging-{UNIQUE}",
    f"x.removed-{UNIQUE.upper()}", "config.yaml", "config.yaml.tmp", f"notes.txt.{UNIQUE}.tmp",
    f"old config.yaml.{UNIQUE}.tmp", f"config.yaml.{UNIQUE}.tmp2",
}  # fmt: skip


def test_only_what_saves_leave_is_swept(tmp_path):
    """People keep their own things beside checkpoints, under names that look alike."""
    for name in SWEPT | OTHERS:
        if ".yaml" in name or ".t" in name or ".json" in name:
            (tmp_path / name).write_text("")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("")
    commit.sweep(tmp_path)
    assert set(names(tmp_path)) == OTHERS


def test_what_was_moved_aside_comes_back_only_to_a_free_name(tmp_path):
    for name, content in (("a", "new"), (f"a.replaced-{UNIQUE}", "old"), (f"b.replaced-{UNIQUE}", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("")
    commit.sweep(tmp_path)
    assert names(tmp_path) == ["a", "b"]
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["new"], ["old"])


@pytest.mark.parametrize("point", ["commit.put_back", "commit.sweep", "commit.sweep_file"])
def test_what_cannot_be_swept_waits_and_hinders_nothing(tmp_path, point):
    left = [f"a.replaced-{UNIQUE}", f"b.staging-{UNIQUE}", f"config.yaml.{UNIQUE}.tmp"]
    for name in left[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / left[2]).write_text("")
    with faults.armed(f"{point}:erofs"):
        commit.sweep(tmp_path)
    assert len(names(tmp_path)) == (1 if point == "commit.put_back" else 2)
    commit.sweep(tmp_path)
    assert names(tmp_path) == ["a"]


def test_what_is_removed_is_gone_at_once_even_if_it_cannot_be_emptied(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(commit.shutil, "rmtree", lambda path, ignore_errors: None)
        commit.remove(tmp_path / "it")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("it.removed-") and commit.set_aside(left) is None
    commit.sweep(tmp_path)
    assert not names(tmp_path)


def test_what_is_not_there_cannot_be_removed(tmp_path):
    with pytest.raises(StorageError, match=r"cannot remove .*nothing"):
        commit.remove(tmp_path / "nothing")


class Disk:
    """Notes, in order, what reached the disk (by inode) and what took another name."""

    def __init__(self, monkeypatch):
        self.events = []
        fsync, rename, replace = os.fsync, Path.rename, os.replace

        def flushed(handle):
            self.events.append(os.fstat(handle).st_ino)
            fsync(handle)

        def renamed(path, target):
            self.events.append(("rename", Path(target).name))
            return rename(path, target)

        def replaced(path, target):
            self.events.append(("rename", Path(target).name))
            replace(path, target)

        monkeypatch.setattr(os, "fsync", flushed)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(os, "replace", replaced)


def inodes(directory):
    return {path.stat().st_ino for path in [directory, *directory.rglob("*")]}


def test_all_of_it_is_on_disk_before_it_takes_its_name_and_the_name_after(tmp_path, monkeypatch):
    final = tmp_path / "it"
    disk = Disk(monkeypatch)
    with commit.staged(final) as staged:
        (staged.path / "deep").mkdir()
        for name in ("a", "deep/b"):
            (staged.path / name).write_text(name)
        staged.described[staged.path / "a"] = {"sha256": "0" * 64, "size": 1}
    named = disk.events.index(("rename", "it"))
    assert set(disk.events[:named]) == inodes(final)
    assert disk.events[named - 1] == final.stat().st_ino  # names last: the manifest's, too
    assert disk.events[named + 1 :] == [tmp_path.stat().st_ino]
    assert (
        '"sha256": "' + "0" * 64 in (final / manifest.MANIFEST).read_text()
    )  # hashed as it was written, not read again


def test_a_replaced_file_is_on_disk_before_it_takes_its_name_and_the_name_after(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    commit.replace_file(tmp_path / "tracker.txt", "1\n")
    assert disk.events == [
        (tmp_path / "tracker.txt").stat().st_ino, ("rename", "tracker.txt"), tmp_path.stat().st_ino,
    ]  # fmt: skip


def test_an_error_of_flushing_any_file_is_one_of_the_save(tmp_path):
    with faults.armed() as passed, commit.staged(tmp_path / "count") as staged:
        (staged.path / "a").write_text("")
    for number in range(1, passed.count("commit.flush") + 1):
        with faults.armed(f"commit.flush@{number}:enospc"), pytest.raises(StorageError, match="No space left"):
            with commit.staged(tmp_path / str(number)) as staged:
                (staged.path / "a").write_text("")


def test_flushing_leaves_no_file_open(tmp_path):
    before = len(os.listdir("/dev/fd"))
    with commit.staged(tmp_path / "it") as staged:
        (staged.path / "a").write_text("")
    commit.replace_file(tmp_path / "tracker.txt", "1\n")
    assert len(os.listdir("/dev/fd")) == before


def test_old_content_that_cannot_be_dropped_is_no_error(tmp_path):
    for content in ("a", "b"):
        with faults.armed("commit.drop_replaced:erofs"), commit.staged(tmp_path / "it") as staged:
            (staged.path / content).write_text("")
    assert names(tmp_path / "it") == ["b", "manifest.json"] and len(names(tmp_path)) == 2
    commit.sweep(tmp_path)
    assert names(tmp_path) == ["it"]


def test_sweeping_what_is_gone_is_no_error(tmp_path):
    commit.sweep(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
