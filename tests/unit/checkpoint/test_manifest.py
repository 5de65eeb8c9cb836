"""Damage of any kind to any file of a checkpoint is found before a tensor is read (row R6)."""

import random
import shutil
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
