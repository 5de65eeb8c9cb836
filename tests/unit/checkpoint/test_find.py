import logging

import pytest

from megatron.checkpoint import manifest
from megatron.checkpoint.find import Found, checkpoints_in, foreign, format_of, iterations, recognise, recognise_if_any
from megatron.checkpoint.manifest import MANIFEST
from megatron.errors import CheckpointError


def native(directory):
    (directory / "tensors").mkdir(parents=True)
    (directory / "tensors" / ".metadata").write_bytes(b"")
    (directory / "facts.json").write_text("{}")
    (directory / MANIFEST).write_bytes(manifest.build(directory, lambda path: None, {}))
    return directory


def megatron(directory):
    (directory / "mp_rank_00_000").mkdir(parents=True)
    (directory / "mp_rank_00_000" / "model_optim_rng.pt").write_bytes(b"")
    return directory


def track(root, text):
    (root / "latest_checkpointed_iteration.txt").write_text(text)


def test_formats_are_told_by_content(tmp_path):
    assert format_of(native(tmp_path / "a")) == "native"
    assert format_of(megatron(tmp_path / "b")) == "megatron"
    assert format_of(tmp_path) is None
    assert format_of(tmp_path / "none") is None
    (tmp_path / "a" / "facts.json").unlink()
    assert format_of(tmp_path / "a") == "native", "damaged, but there: not to be taken for nothing"
    (tmp_path / "a" / MANIFEST).unlink()
    assert format_of(tmp_path / "a") is None


def test_a_manifest_alone_makes_no_checkpoint(tmp_path):
    """Many programs call a file manifest.json."""
    (tmp_path / MANIFEST).write_text("{}")
    native(tmp_path / "iter_0000010")
    assert format_of(tmp_path) is None
    assert recognise(tmp_path).iteration == 10


@pytest.mark.parametrize("left", [(), ("tensors",), ("tensors/.metadata",), ("facts.json",), (MANIFEST, "tokenizer")])
def test_a_directory_of_an_iteration_with_nothing_foreign_in_it_is_damaged(tmp_path, caplog, left):
    native(tmp_path / "iter_0000010")
    damaged = tmp_path / "iter_0000020"
    damaged.mkdir()
    for name in left:
        (damaged / name).mkdir(parents=True)
    assert format_of(damaged) == "native" and not foreign(tmp_path)
    assert [found.iteration for found in checkpoints_in(tmp_path)] == [10, 20]
    assert recognise(tmp_path).iteration == 10
    assert "iter_0000020" in caplog.text and "looking for an older one" in caplog.text
    with pytest.raises(CheckpointError, match="iter_0000020"):
        recognise(damaged)


def test_what_is_not_ours_is_foreign(tmp_path):
    native(tmp_path / "iter_0000010")
    megatron(tmp_path / "iter_0000020")
    (tmp_path / "iter_0000030").mkdir()
    (tmp_path / "iter_0000030" / "notes.txt").write_text("")
    (tmp_path / "iter_0000040").write_text("")
    (tmp_path / "other").mkdir()
    assert foreign(tmp_path) == {20: "megatron", 30: None, 40: None}
    assert [found.iteration for found in checkpoints_in(tmp_path)] == [10, 20]


def test_a_directory_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    native(tmp_path / "iter_0000010")

    def stale(_path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("pathlib.Path.iterdir", stale)
    for look in (recognise, checkpoints_in, foreign, iterations):
        with pytest.raises(CheckpointError, match=r"cannot read .*: .*Stale file handle"):
            look(tmp_path)


def test_megatron_checkpoints_beyond_the_tracker_do_not_count(tmp_path, caplog):
    """They have no manifest: nobody knows whether they were written to their end."""
    native(tmp_path / "iter_0000010")
    megatron(tmp_path / "iter_0000020")
    track(tmp_path, "10\n")
    assert recognise(tmp_path) == Found(tmp_path / "iter_0000010", 10, "native")
    assert recognise(tmp_path, 20) == Found(tmp_path / "iter_0000020", 20, "megatron")
    assert not caplog.records


@pytest.mark.parametrize("text", [None, "30", "", "release", "ten", "-5", "9" * 5000, "1.5", "10 20"])
def test_without_a_good_tracker_the_newest_is_taken_and_that_is_said(tmp_path, caplog, text):
    native(tmp_path / "iter_0000010")
    native(tmp_path / "iter_0000020")
    native(tmp_path / "iter_0000040.staging-0123")
    native(tmp_path / "old-iter_0000050")
    (tmp_path / "iter_0000060").write_text("a file")
    if text is not None:
        track(tmp_path, text)
    with caplog.at_level(logging.WARNING):
        assert recognise(tmp_path).iteration == 20
    assert "newest whole iteration, 20" in caplog.text


def test_a_native_checkpoint_beyond_the_tracker_is_whole_and_newer(tmp_path, caplog):
    """A save that was killed before it came to the tracker."""
    native(tmp_path / "iter_0000010")
    native(tmp_path / "iter_0000020")
    track(tmp_path, "10\n")
    assert recognise(tmp_path).iteration == 20
    assert "says 10: taking the newest whole iteration, 20" in caplog.text


def test_releases(tmp_path):
    megatron(tmp_path / "release")
    expected = Found(tmp_path / "release", 0, "megatron", release=True)
    assert recognise(tmp_path) == expected
    megatron(tmp_path / "iter_0000003")
    track(tmp_path, "release")
    assert recognise(tmp_path) == expected
    assert recognise(tmp_path / "release") == expected


def test_a_checkpoint_itself(tmp_path):
    directory = native(tmp_path / "iter_0000010")
    assert recognise(directory) == recognise(directory, 10) == Found(directory, 10, "native")
    with pytest.raises(CheckpointError, match="is iteration 10, not 11"):
        recognise(directory, 11)
    assert recognise(megatron(tmp_path / "renamed")).iteration == 0


def test_one_that_a_crash_left_moved_aside_counts_until_it_is_replaced(tmp_path):
    aside = native(tmp_path / f"iter_0000010.replaced-{'a' * 32}")
    assert recognise(tmp_path, 10) == Found(aside, 10, "native")
    new = native(tmp_path / "iter_0000010")
    assert recognise(tmp_path, 10).directory == new


def test_nothing_there(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        assert recognise_if_any(root) is None
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*--load"):
            recognise(root)
    with pytest.raises(CheckpointError, match=r"iter_0000005 holds no complete checkpoint. Iterations there: none"):
        recognise_if_any(tmp_path, 5)
    native(tmp_path / "iter_0000007")
    with pytest.raises(CheckpointError, match="Iterations there: 7"):
        recognise(tmp_path, 5)


def test_a_tracker_without_checkpoints_is_never_a_fresh_start(tmp_path):
    track(tmp_path, "5")
    with pytest.raises(CheckpointError, match="says 5, but"):
        recognise_if_any(tmp_path)
