"""Damage of any kind to any file of a checkpoint is found before a tensor is read (row R6)."""

import json
import os
import random
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import manifest, native
from megatron.checkpoint.find import recognise
from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.state import RunState
from megatron.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    words = root / "vocab.json"
    words.write_text('{"a": 0}')
    generator = torch.Generator().manual_seed(1)
    state = RunState(
        {f"model/layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(6)}, {"consumed_samples": 12}
    )
    return native.save(root, 5, state, [words])


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "iter_0000005"))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        recognise(directory.parent)
    return str(caught.value)


def test_a_whole_one_verifies(whole: Path) -> None:
    sizes = manifest.verify(whole)
    assert sizes == {
        path.relative_to(whole).as_posix(): path.stat().st_size for path in files(whole) if path.name != MANIFEST
    }
    assert {"facts.json", "tensors/.metadata", "tokenizer/vocab.json"} < sizes.keys()


def flips(directory: Path, count: int) -> list[tuple[str, int, int]]:
    """File, byte and bit: each file gets its turn, small and large alike."""
    draw = random.Random(1)
    names = [path.relative_to(directory).as_posix() for path in files(directory)]
    places = []
    for i in range(count):
        name = names[i % len(names)]
        places.append((name, draw.randrange((directory / name).stat().st_size), draw.randrange(8)))
    return places


def flip_all(copy: Path, count: int) -> None:
    for name, byte, bit in flips(copy, count):
        path = copy / name
        content = path.read_bytes()
        changed = bytearray(content)
        changed[byte] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            manifest.verify(copy)
        assert path.name in str(caught.value)
        path.write_bytes(content)
    manifest.verify(copy)


def truncate_all(copy: Path, count: int) -> None:
    draw = random.Random(2)
    there = files(copy)
    for i in range(count):
        path = there[i % len(there)]
        content = path.read_bytes()
        path.write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(CheckpointError) as caught:
            manifest.verify(copy)
        assert path.name in str(caught.value)
        path.write_bytes(content)
    manifest.verify(copy)


def test_every_flipped_bit_is_found(copy: Path) -> None:
    flip_all(copy, 150)


def test_every_truncation_is_found(copy: Path) -> None:
    truncate_all(copy, 50)


@pytest.mark.slow
def test_every_flipped_bit_is_found_at_full_figures(copy: Path) -> None:
    flip_all(copy, 1000)
    truncate_all(copy, 200)


@pytest.mark.parametrize("change", ["delete", "zero", "swap", "add", "link"])
def test_other_damage(copy: Path, change: str) -> None:
    for path in files(copy):
        content = path.read_bytes()
        other = next(p for p in files(copy) if p != path)
        theirs = other.read_bytes()
        if change == "delete":
            path.unlink()
        elif change == "zero":
            path.write_bytes(bytes(len(content)))
        elif change == "swap":
            path.write_bytes(theirs)
            other.write_bytes(content)
        elif change == "add":
            path.with_name("extra").write_bytes(b"x")
        else:
            path.unlink()
            path.symlink_to(other)
        if change == "add" and path.parent == copy:
            assert manifest.unlisted(copy) == ["extra"] and recognise(copy.parent).iteration == 5
        else:
            refused(copy)
        path.unlink(missing_ok=True)
        path.with_name("extra").unlink(missing_ok=True)
        path.write_bytes(content)
        other.write_bytes(theirs)
        manifest.verify(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_paths_outside_are_refused(copy: Path, name: str) -> None:
    entries = {name: {"sha256": "0" * 64, "size": 1}}
    (copy / MANIFEST).write_bytes(manifest._encode(entries))
    assert "outside its directory" in refused(copy)


def test_a_later_version_is_named(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    assert "version 2; this program reads 1" in refused(copy)


def test_the_newest_intact_one_is_taken(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for iteration in (5, 6, 7):
        native.save(tmp_path, iteration, RunState({"model/a": torch.full((4,), float(iteration))}, {}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert recognise(tmp_path).iteration == 7
    shard = next((tmp_path / "iter_0000007" / "tensors").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    caplog.clear()
    assert recognise(tmp_path).iteration == 6
    assert "iter_0000007 is damaged" in caplog.text and shard.name in caplog.text
    with pytest.raises(CheckpointError, match="iter_0000007 is damaged"):
        recognise(tmp_path, 7)
    for iteration in (5, 6):
        (tmp_path / f"iter_000000{iteration}" / "facts.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        recognise(tmp_path)
    assert [line.split(" is ")[0][-12:] for line in str(caught.value).splitlines()[1:]] == [
        "iter_0000007", "iter_0000006", "iter_0000005",
    ]  # fmt: skip


def test_all_that_is_wrong_is_said_at_once(copy: Path) -> None:
    (copy / "tensors" / "extra").write_text("")
    (copy / "tokenizer" / "vocab.json").unlink()
    (copy / "facts.json").write_text((copy / "facts.json").read_text().replace("12", "21"))
    (copy / "tensors" / ".metadata").write_bytes(b"1234567")
    size = json.loads((copy / MANIFEST).read_text())["files"]["tensors/.metadata"]["size"]
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(copy)
    assert str(caught.value) == (
        f"{copy} is damaged: facts.json has another content than was written; "
        f"tensors/.metadata has 7 bytes instead of {size:,}; tensors/extra does not belong there; "
        "tokenizer/vocab.json is missing"
    )


def test_without_a_manifest_it_was_not_written_to_its_end(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"was not written to its end: it has no manifest\.json"):
        manifest.verify(copy)
    (copy / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=r"is not whole: manifest.json cannot be read \(Is a directory\)"):
        manifest.verify(copy)


def test_a_link_is_not_followed_even_to_the_same_content(copy: Path, tmp_path: Path) -> None:
    path = copy / "facts.json"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises((CheckpointError, OSError)):
        manifest.verify(copy)


def test_a_linked_directory_is_nothing_of_ours(copy: Path, tmp_path: Path) -> None:
    (copy / "tensors").rename(tmp_path / "outside")
    (copy / "tensors").symlink_to(tmp_path / "outside")
    assert "tensors does not belong there; tensors/.metadata is missing" in refused(copy)
    with pytest.raises(OSError):
        manifest.build(copy, lambda path: None, {})


def test_what_others_put_beside_is_left_alone(copy: Path, tmp_path: Path) -> None:
    """A file manager's notes, say, or a link to somewhere: nothing here reads it."""
    sizes = manifest.verify(copy)
    assert manifest.unlisted(copy) == []
    (copy / ".DS_Store").write_bytes(b"x")
    (copy / "plots").mkdir()
    (copy / "plots" / "loss.png").write_bytes(b"x")
    (copy / "link").symlink_to(tmp_path)
    os.mkfifo(copy / "pipe")
    assert manifest.verify(copy) == sizes and recognise(copy.parent).iteration == 5
    assert manifest.unlisted(copy) == [".DS_Store", "link", "pipe", "plots/loss.png"]


def test_a_pipe_in_the_place_of_a_file_is_refused(copy: Path) -> None:
    (copy / "facts.json").unlink()
    os.mkfifo(copy / "facts.json")
    assert "facts.json is no ordinary file" in refused(copy)


def sealed(**entry: object) -> bytes:
    """A manifest that is whole in itself, whatever it says of a file."""
    return manifest._encode({"facts.json": {"sha256": "0" * 64, "size": 1} | entry})


@pytest.mark.parametrize(
    "content",
    [
        sealed(size="1"), sealed(size=1.0), sealed(size=True), sealed(sha256=0), sealed(sha256=None), sealed(more=1),
        sealed(size=None), sealed(size=[1]), sealed().replace(b'"size"', b'"length"'), sealed()[:-1], sealed() + b" ",
        sealed().replace(b"manifest", b"something"), sealed().replace(b'"files"', b'"content"'), b"[]", b"{}", b"1",
        b'{"files": []}', b'{"files": {"a": 1}}', b'{"files": {"a": {}}}', b"[" * 100_000, b"\xff", b"",
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_none(copy: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: manifest.json is (none|not as it was written)"):
        manifest.verify(copy)


def test_only_our_format_has_versions(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 2').replace("ee-llm-manifest", "another"))
    assert "manifest.json is not as it was written" in refused(copy)


def test_each_file_and_directory_is_flushed_once(copy: Path) -> None:
    flushed: list[Path] = []
    content = manifest.build(copy, flushed.append, {})
    assert sorted(flushed) == sorted([copy, *copy.rglob("*")])
    assert sorted(json.loads(content)["files"]) == sorted(path.relative_to(copy).as_posix() for path in files(copy))


def test_a_flush_that_fails_is_an_error_whichever_it_is(copy: Path) -> None:
    for failing in [copy, *copy.rglob("*")]:

        def flush(path: Path, failing: Path = failing) -> None:
            if path == failing:
                raise OSError(5, "Input/output error")

        with pytest.raises(OSError, match="Input/output error"):
            manifest.build(copy, flush, {})


def test_what_is_described_is_not_read_again(copy: Path) -> None:
    known: manifest.Description = {"sha256": "1" * 64, "size": 3}
    entries = json.loads(manifest.build(copy, lambda path: None, {copy / "facts.json": known}))["files"]
    assert entries["facts.json"] == known
    assert entries["tokenizer/vocab.json"]["size"] == os.path.getsize(copy / "tokenizer" / "vocab.json")


def test_large_files_are_hashed_in_blocks(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(manifest._BLOCK * 2 + 7)
    (tmp_path / "large").write_bytes(content)
    described: dict[Path, manifest.Description] = {}
    read = manifest.build(tmp_path, lambda path: None, described)
    described[tmp_path / "large"] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    assert read == manifest.build(tmp_path, lambda path: None, described)
