import errno
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron import faults
from megatron.checkpoint import manifest, native
from megatron.checkpoint.find import recognise
from megatron.checkpoint.state import RunState
from megatron.errors import CheckpointError, StorageError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def state():
    weight = torch.randn(6, 3)
    return RunState(
        {
            "model/output.weight": weight[:4],
            "model/output.weight.padding": weight[4:],
            "model/norm.weight": torch.randn(3).bfloat16(),
            "optimizer/exp_avg/output.weight": torch.randn(3, 4).t(),
            "optimizer/master/norm.weight": torch.tensor(2.5),
        },
        {"seed": 1, "config": {"exits": [2, 4], "lr": 1e-4}, "text": "ü", "none": None},
    )


def blank(tensors):
    return {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, state):
    directory = native.save(tmp_path, 1200, state)
    assert directory == tmp_path / "iter_0001200"
    assert names(tmp_path) == ["iter_0001200", "latest_checkpointed_iteration.txt"]
    assert names(directory) == ["facts.json", "manifest.json", "tensors"]
    targets = blank(state.tensors)
    native.load(directory, targets)
    assert_equal(targets, state.tensors)
    assert_equal(native.read(directory).tensors, state.tensors)
    facts = native.read_facts(directory)
    assert state.facts.items() <= facts.items()
    assert (facts["format"], facts["iteration"], facts["format_version"]) == ("native", 1200, 1)
    assert recognise(tmp_path).iteration == 1200


def test_views_are_saved_alone_and_filled_in_place(tmp_path):
    live = torch.nn.Parameter(torch.randn(1000, 4))
    parts = {"model/output.weight": live.detach()[:2], "model/output.weight.padding": live.detach()[998:]}
    directory = native.save(tmp_path, 1, RunState(parts))
    assert sum(file.stat().st_size for file in directory.rglob("*.distcp")) < 8000
    wanted = {name: tensor.clone() for name, tensor in parts.items()}
    with torch.no_grad():
        live.zero_()
    native.load(directory, {"model/output.weight": live[:2], "model/output.weight.padding": live[998:]})
    assert_equal(parts, wanted)
    assert not live[2:998].any()


SHAPES = st.lists(st.integers(1, 5), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8])


@settings(max_examples=15, deadline=None)
@given(specs=st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, DTYPES), min_size=1, max_size=5))
def test_any_names_shapes_and_types_make_the_round_trip(tmp_path_factory, specs):
    tensors = {f"model/{name}": (100 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in specs.items()}
    directory = native.save(tmp_path_factory.mktemp("any"), 3, RunState(tensors))
    assert native.tensor_index(directory) == {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}
    assert_equal(native.read(directory).tensors, tensors)


def test_nothing_is_loaded_when_anything_differs(tmp_path, state):
    directory = native.save(tmp_path, 1, state)
    targets = blank(state.tensors) | {"model/exits.2.norm.weight": torch.full((3,), 7.0)}
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint:\n    model/exits.2.norm.weight"):
        native.load(directory, targets)
    assert all((tensor == 7).all() for tensor in targets.values())
    del targets["model/exits.2.norm.weight"], targets["model/norm.weight"]
    with pytest.raises(CheckpointError, match=r"not in the model:\n    model/norm.weight"):
        native.load(directory, targets)
    assert all((tensor == 7).all() for tensor in targets.values())


def test_the_optimizer_can_be_left_aside(tmp_path, state):
    directory = native.save(tmp_path, 1, state)
    targets = {name: tensor for name, tensor in blank(state.tensors).items() if name.startswith("model/")}
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        native.load(directory, targets)
    native.load(directory, targets, ignore=("optimizer/",))
    assert torch.equal(targets["model/output.weight"], state.tensors["model/output.weight"])
    assert native.read(directory, ignore=("optimizer/",)).tensors.keys() == targets.keys()


def test_weights_are_converted_only_when_asked(tmp_path, state):
    directory = native.save(tmp_path, 1, state)
    targets = blank(state.tensors)
    targets["model/output.weight"] = targets["model/output.weight"].bfloat16()
    with pytest.raises(CheckpointError, match="checkpoint float32, model bfloat16"):
        native.load(directory, targets)
    native.load(directory, targets, convert=True)
    assert torch.equal(targets["model/output.weight"], state.tensors["model/output.weight"].bfloat16())


def test_another_padding_is_filled_with_zeros_and_said(tmp_path, state, caplog):
    directory = native.save(tmp_path, 1, state)
    targets = blank(state.tensors)
    targets["model/output.weight.padding"] = torch.full((3, 3), 7.0)
    targets["optimizer/exp_avg/output.weight.padding"] = torch.full((2, 4), 7.0)
    with caplog.at_level(logging.INFO):
        native.load(directory, targets)
    assert "pads the vocabulary" in caplog.text
    assert torch.equal(targets["model/output.weight.padding"][:2], state.tensors["model/output.weight.padding"])
    assert not targets["model/output.weight.padding"][2].any()
    assert not targets["optimizer/exp_avg/output.weight.padding"].any()
    del targets["model/output.weight.padding"]
    native.load(directory, targets)


def test_the_same_iteration_is_replaced(tmp_path, state):
    native.save(tmp_path, 5, state)
    second = RunState({name: tensor + 1 for name, tensor in state.tensors.items()}, {"seed": 2})
    directory = native.save(tmp_path, 5, second)
    assert_equal(native.read(directory).tensors, second.tensors)
    assert native.read_facts(directory)["seed"] == 2
    assert names(tmp_path) == ["iter_0000005", "latest_checkpointed_iteration.txt"]


def test_another_format_is_never_replaced(tmp_path, state, legacy, recipe):
    legacy(tmp_path, recipe(iteration=5))
    before = (tmp_path / "iter_0000005/mp_rank_00/model_optim_rng.pt").read_bytes()
    with pytest.raises(StorageError, match=r"iter_0000005 exists .*\(megatron\).*--save"):
        native.save(tmp_path, 5, state)
    assert (tmp_path / "iter_0000005/mp_rank_00/model_optim_rng.pt").read_bytes() == before
    assert names(tmp_path) == ["iter_0000005", "latest_checkpointed_iteration.txt"]
    (tmp_path / "iter_0000006").mkdir()
    (tmp_path / "iter_0000006" / "notes.txt").write_text("mine")
    (tmp_path / "iter_0000008").write_text("no directory")
    for iteration in (6, 8):
        with pytest.raises(StorageError, match="unknown content"):
            native.save(tmp_path, iteration, state)
    assert (tmp_path / "iter_0000006" / "notes.txt").read_text() == "mine"
    native.save(tmp_path, 7, state)
    assert recognise(tmp_path).format == "native"
    assert recognise(tmp_path, 5).format == "megatron"


@pytest.mark.parametrize("left", [[], ["tensors"], ["facts.json"], ["manifest.json", "tokenizer"]], ids="+".join)
def test_a_damaged_one_is_replaced(tmp_path, state, left):
    for name in left:
        (tmp_path / "iter_0000005" / name).mkdir(parents=True)
    (tmp_path / "iter_0000005").mkdir(exist_ok=True)
    assert_equal(native.read(native.save(tmp_path, 5, state)).tensors, state.tensors)
    assert names(tmp_path) == ["iter_0000005", "latest_checkpointed_iteration.txt"]


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, state, monkeypatch):
    directory = native.save(tmp_path, 5, state)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StorageError, match="No space left"):
        patched.setattr(torch, "save", full)
        native.save(tmp_path, 6, state)
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="No space left"):
        patched.setattr("os.fsync", full)
        native.save(tmp_path, 5, RunState({"model/a": torch.ones(1)}))
    assert names(tmp_path) == ["iter_0000005", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    assert_equal(native.read(directory).tensors, state.tensors)


@pytest.mark.parametrize("operation", ["iterdir", "exists", "is_dir", "is_file"])
def test_a_directory_that_is_stale(tmp_path, state, monkeypatch, operation):
    """As a network file system answers once its server was restarted: whoever asks, it is a failed save."""
    root = tmp_path / "save"
    for iteration in (5, 6):
        native.save(root, iteration, state)
    plain = getattr(Path, operation)
    asked = failed = 0
    which = 1  # of the answers is an error

    def stale(path: Path) -> object:
        nonlocal asked
        asked += root in (path, *path.parents)
        if asked == which:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(path)

    while which < 20 and asked >= which - 1:
        asked = 0
        with monkeypatch.context() as patched:
            patched.setattr(Path, operation, stale)
            try:
                native.save(root, 6, state)
                native.prune(root, 1, 6, {5})
            except StorageError as error:
                assert "Stale file handle" in str(error)
                failed += 1
        assert recognise(root).iteration == 6
        which += 1
    assert failed and which > 2


@pytest.mark.parametrize("room", [0, 100, 700, 2000, 5000])
def test_a_disk_that_fills_up_while_tensors_are_written(tmp_path, state, monkeypatch, room):
    """Torch's zip writer turns the OSError into a RuntimeError of its own."""

    class Full:
        def __init__(self, file):
            self.file, self.room = file, room

        def write(self, content):
            self.room -= len(content)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    @contextmanager
    def create_stream(self, path, mode):
        with open(path, mode) as file:
            yield Full(file) if "w" in mode else file

    native.save(tmp_path, 5, state)
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="cannot write"):
        patched.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", create_stream)
        native.save(tmp_path, 6, state)
    assert names(tmp_path) == ["iter_0000005", "latest_checkpointed_iteration.txt"]


def test_our_own_mistakes_are_not_blamed_on_the_disk(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="JSON"):
        native.save(tmp_path, 1, RunState({}, {"loss": float("nan")}))
    with pytest.raises(TypeError):
        native.save(tmp_path, 1, RunState({}, {"path": tmp_path}))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(torch, "save", lambda *args, **options: 1 / 0)
        native.save(tmp_path, 1, RunState({"model/a": torch.ones(1)}))
    assert names(tmp_path) == []


def test_tokenizer_files_travel_with_their_hashes(tmp_path, state):
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("a b")
    directory = native.save(tmp_path / "out", 1, state, [source / "vocab.json", source / "merges.txt"])
    files = native.tokenizer_files(directory)
    assert {name: path.read_text() for name, path in files.items()} == {"vocab.json": "{}", "merges.txt": "a b"}
    files["merges.txt"].write_text("a c")
    with pytest.raises(CheckpointError, match=r"merges.txt is missing or not the file"):
        native.tokenizer_files(directory)
    with pytest.raises(CheckpointError, match=r"two tokenizer files are called vocab.json"):
        native.save(tmp_path / "out", 2, state, [source / "vocab.json", source / "vocab.json"])
    assert native.tokenizer_files(native.save(tmp_path / "out", 3, state)) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "does not describe"),
        ('{"format": "other"}', "does not describe"),
        ("[" * 100_000, "damaged"),
        ('{"format": "native", "format_version": 2}', "format version 2; this program reads 1"),
        ('{"format": "native", "format_version": 1}', "lacks iteration"),
        ('{"format": "native", "format_version": 1, "iteration": "1"}', "iteration is '1', not a number"),
        ('{"format": "native", "format_version": 1, "iteration": 1.0}', "iteration is 1.0, not a whole number"),
        ('{"format": "native", "format_version": 1, "iteration": 1}', "lacks tokenizer_sha256"),
        ('{"format": "native", "format_version": 1, "iteration": 1, "tokenizer_sha256": {"a": 1}}', "a is 1, not text"),
    ],
)
def test_bad_facts(tmp_path, state, text, message):
    directory = native.save(tmp_path, 1, state)
    (directory / "facts.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        native.read_facts(directory)
    (directory / "facts.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        native.read_facts(directory)


def test_damaged_tensor_files_are_named(tmp_path, state):
    directory = native.save(tmp_path, 1, state)
    file = directory / "tensors" / "__0_00.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="iter_0000001 is damaged"):
        native.read(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000001 is damaged.*__0_00.distcp"):
        native.read(directory)


def test_the_same_state_gives_the_same_files_and_no_paths(tmp_path, state):
    first, second = (native.save(tmp_path / name, 1, state) for name in ("a", "b"))
    for file in ("facts.json", "tensors/.metadata"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert str(tmp_path).encode() not in (first / "tensors" / ".metadata").read_bytes()
    assert json.loads((first / "facts.json").read_text())["text"] == "ü"


def test_stock_torch_reads_it_too(tmp_path, state):
    directory = native.save(tmp_path, 1, state)
    targets = blank(state.tensors)
    torch.distributed.checkpoint.load(targets, checkpoint_id=directory / "tensors", no_dist=True)
    assert_equal(targets, state.tensors)


def large_state() -> RunState:
    """More than two files' worth."""
    generator = torch.Generator().manual_seed(1)
    sizes = [1 << 20, 2 << 20, 3, 1000] + 9 * [2 << 20]
    return RunState({f"model/{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)})


def test_a_large_checkpoint_is_cut_into_files_of_like_size(tmp_path: Path) -> None:
    state = large_state()
    directory = native.save(tmp_path, 1, state)
    sizes = [path.stat().st_size for path in sorted((directory / "tensors").glob("*.distcp"))]
    assert len(sizes) == 5 and max(sizes) <= 1.5 * min(sizes)
    loaded = native.read(directory).tensors
    assert all(torch.equal(loaded[name], state.tensors[name]) for name in state.tensors)


def test_the_hashes_made_while_writing_are_those_of_the_files(tmp_path: Path) -> None:
    directory = native.save(tmp_path, 1, large_state())
    written = (directory / manifest.MANIFEST).read_bytes()
    (directory / manifest.MANIFEST).unlink()
    assert manifest.build(directory, lambda path: None, {}) == written


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    manifests = {native.save(tmp_path, i, large_state()).joinpath("tensors", ".metadata").read_bytes() for i in (1, 2)}
    assert len(manifests) == 1


@pytest.mark.parametrize("write", [1, 40, 80])
def test_an_error_in_any_of_the_writing_threads_is_one_of_the_save(tmp_path: Path, write: int) -> None:
    with faults.armed(f"tensors.write@{write}:enospc"), pytest.raises(StorageError, match="No space left"):
        native.save(tmp_path, 1, large_state())
    assert not list(tmp_path.iterdir())
