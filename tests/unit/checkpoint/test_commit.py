from pathlib import Path

import pytest

from megatron.checkpoint import commit
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
