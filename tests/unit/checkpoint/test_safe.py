"""The restricted readers of pickles."""

import argparse
import os
import pickle
import pickletools
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.checkpoint import native
from megatron.checkpoint.safe import Namespace, read_dcp_metadata, read_legacy
from megatron.checkpoint.state import RunState
from megatron.errors import CheckpointError
from tests.unit.checkpoint.pickles import PAYLOADS, Reduce


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PAYLOADS)
def test_what_a_file_asks_for_is_named(tmp_path, name, zipped):
    mark, file = tmp_path / "mark", tmp_path / "model_optim_rng.pt"
    state = {"args": PAYLOADS[name](mark), "model": {"w": torch.ones(2)}}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model_optim_rng.pt: (refused: it asks for [\w.]+|numpy arrays)"):
        read_legacy(file)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["os.system", "eval", "numpy objects"])
def test_no_pickle_protocol_helps(tmp_path, name, protocol):
    mark, file = tmp_path / "mark", tmp_path / "f.pt"
    torch.save({"args": PAYLOADS[name](mark)}, file, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"f.pt"):
        read_legacy(file)
    file.write_bytes(pickle.dumps(PAYLOADS[name](mark), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"f.pt"):
        read_legacy(file)
    assert not mark.exists()


def test_numpy_objects_are_refused_even_if_harmless(tmp_path):
    torch.save({"rng_state": np.array([{}, None], dtype=object)}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=r"f.pt: numpy arrays of type 'O8' are not read"):
        read_legacy(tmp_path / "f.pt")


def zip_of(path: Path, entries: list[tuple[str, bytes]], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def test_two_pickles_in_one_file_are_refused(tmp_path):
    good = pickle.dumps({"a": 1}, protocol=2)
    entries = [("x/data.pkl", good), ("y/data.pkl", good), ("x/version", b"3")]
    with pytest.raises(CheckpointError, match="2 pickles"):
        read_legacy(zip_of(tmp_path / "f.pt", entries))


def test_compressed_entries_are_refused_before_they_are_expanded(tmp_path):
    bomb = zip_of(tmp_path / "f.pt", [("x/data.pkl", b"\0" * 10_000_000)], zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_legacy(bomb)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x80\x02\x82\x01.", "extension codes"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo is larger"),
        (b"\x80\x02(iposix\nsystem\n.", "posix.system"),
        (b"\x80\x02]N.", "damaged|holds a"),
        (b"\x80\x02K\x01.", "holds a int"),
        (b"\x80\x02", "damaged"),
        (b"", "damaged"),
    ],
)
def test_strange_pickles_are_refused(tmp_path, body, message):
    file = zip_of(tmp_path / "f.pt", [("x/data.pkl", body), ("x/version", b"3\n"), ("x/byteorder", b"little")])
    with pytest.raises(CheckpointError, match=message):
        read_legacy(file)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    file = tmp_path / "f.pt"
    torch.save({"w": torch.ones(3, 5)}, file)
    content = file.read_bytes()
    shape = pickle.dumps((3, 5), protocol=2)[2:6]
    assert content.count(shape) == 1
    file.write_bytes(content.replace(shape, shape[:1] + b"\xff" + shape[2:]))
    with pytest.raises(CheckpointError, match="damaged"):
        read_legacy(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02.", b"PK\x03\x04" + b"\0" * 100])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_legacy(tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_legacy(tmp_path / "none.pt")


def state_of_megatron():
    return {
        "args": argparse.Namespace(lr=1e-4, dtype=torch.bfloat16, sizes=torch.Size([1, 2]), none=None, big=2**40),
        "model": OrderedDict(w=torch.arange(6.0).reshape(2, 3), half=torch.ones(2, dtype=torch.bfloat16)),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "rng_state": [{"np": np.random.RandomState(1).get_state(), "torch": torch.get_rng_state()}],
        "scalar": np.float64(3.5),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_megatron_writes_is_read(tmp_path, zipped):
    torch.save(state_of_megatron(), tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    found = read_legacy(tmp_path / "f.pt")
    assert isinstance(found["args"], Namespace)
    assert vars(found["args"]) == vars(state_of_megatron()["args"])
    assert torch.equal(found["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert found["model"]["half"].dtype == torch.bfloat16
    assert len(found["rng_state"][0]["np"]) == 5


class PerName:
    """Pickles as `getattr(owner, name)`, as some releases of Python 3.11 write members of enumerations."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("zipped", [True, False])
def test_members_written_by_name_are_read(tmp_path, zipped):
    kind = type("ModelType", (), {"__module__": "megatron.core.enums"})
    module = sys.modules["megatron.core.enums"] = types.ModuleType("megatron.core.enums")
    module.ModelType = kind
    try:
        state = {"args": argparse.Namespace(model_type=PerName(kind, "encoder_or_decoder"))}
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules["megatron.core.enums"]
    assert repr(read_legacy(tmp_path / "a.pt")["args"].model_type) == "ModelType.encoder_or_decoder"


def test_getattr_of_anything_else_is_refused(tmp_path):
    torch.save({"args": PerName(argparse.Namespace, "__init__")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="getattr of what is no enumeration"):
        read_legacy(tmp_path / "a.pt")


def test_globals_that_others_registered_make_no_difference(tmp_path):
    torch.save({"a": Reduce(os.getpid, ())}, tmp_path / "f.pt")
    outside = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([os.getpid, argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match=r"posix.getpid"):
            read_legacy(tmp_path / "f.pt")
        torch.save(state_of_megatron(), tmp_path / "g.pt")
        assert isinstance(read_legacy(tmp_path / "g.pt")["args"], Namespace)
        assert set(torch.serialization.get_safe_globals()) == before
    assert set(torch.serialization.get_safe_globals()) == outside


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_gives_our_error_or_a_dictionary(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("damage") / "f.pt"
    zipped = data.draw(st.booleans())
    torch.save(state_of_megatron(), file, _use_new_zipfile_serialization=zipped)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content) - 1, 4000)))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    file.write_bytes(content)
    try:
        assert isinstance(read_legacy(file), dict)
    except CheckpointError as error:
        assert "f.pt" in str(error)


# --- the index of torch.distributed.checkpoint --------------------------------------------------------------------


@pytest.fixture
def index(tmp_path):
    state = RunState({"model/a": torch.randn(3, 2), "model/b": torch.tensor(1.0).bfloat16()})
    return native.save(tmp_path, 1, state) / "tensors" / ".metadata"


def test_our_own_index_is_read(index):
    metadata = read_dcp_metadata(index)
    theirs = pickle.loads(index.read_bytes())
    assert metadata.storage_data == theirs.storage_data
    assert metadata.state_dict_metadata == theirs.state_dict_metadata


def test_an_index_whose_memory_formats_are_written_by_name_is_read(index):
    """Python 3.11.2 writes it so; whatever is asked for there is kept, and never looked up."""
    ours = read_dcp_metadata(index)
    metadata = pickle.loads(index.read_bytes())
    encoding = type(metadata.state_dict_metadata["model/a"].properties.__getstate__()[3])
    for entry in metadata.state_dict_metadata.values():
        properties = entry.properties
        entry.properties = Reduce(type(properties), (), (*properties.__getstate__()[:3], PerName(encoding, "x"), False))
    index.write_bytes(pickle.dumps(metadata))
    assert b"getattr" in index.read_bytes()
    assert read_dcp_metadata(index) == ours


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", PAYLOADS)
def test_what_an_index_asks_for_is_named(index, tmp_path, name, protocol):
    mark = tmp_path / "mark"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = PAYLOADS[name](mark)
    index.write_bytes(pickle.dumps(metadata, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: it asks for"):
        native.tensor_index(index.parent.parent)
    assert not mark.exists()


def tampered(index, change):
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


def _bytes_entry(metadata):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata["model/a"] = BytesStorageMetadata()


def _each_place(**changes):
    def change(metadata):
        for info in metadata.storage_data.values():
            vars(info).update(changes)

    return change


def _parts(*parts):
    """Another division of the tensor into parts, each with a place."""

    def change(metadata):
        sizes = [dcp.ChunkStorageMetadata(*map(torch.Size, part)) for part in parts]
        metadata.state_dict_metadata["model/a"].chunks = sizes
        place = next(iter(metadata.storage_data.values()))
        places = {dcp.MetadataIndex("model/a", part.offsets, number): place for number, part in enumerate(sizes)}
        metadata.storage_data.update(places)

    return change


def test_parts_that_make_up_a_tensor_are_read(index):
    tampered(index, _parts(((0, 0), (2, 2)), ((2, 0), (1, 2))))
    parts = read_dcp_metadata(index).state_dict_metadata["model/a"].chunks
    assert [tuple(part.sizes) for part in parts] == [(2, 2), (1, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_bytes_entry, "'model/a' is not a tensor"),
        (_each_place(relative_path="../../../etc/passwd"), "placed in '../../../etc/passwd'"),
        (_each_place(relative_path="/etc/passwd"), "placed in"),
        (_each_place(relative_path=3), "where a name belongs"),
        (_each_place(transform_descriptors=["zstd"]), "placed in"),
        (_each_place(offset=-1), "natural numbers"),
        (_each_place(length="x"), "natural numbers"),
        (lambda m: m.storage_data.clear(), "does not say where model/a lies"),
        (lambda m: m.state_dict_metadata.update(x=3), "'x' is not a tensor"),
        (lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["model/a"]}), "where a name belongs"),
        (lambda m: setattr(m, "storage_data", None), "damaged"),
        (lambda m: setattr(m.state_dict_metadata["model/a"], "size", (-1,)), "natural numbers"),
        (lambda m: setattr(m.state_dict_metadata["model/a"].properties, "dtype", 3), "no number type"),
        (lambda m: setattr(m.state_dict_metadata["model/a"], "properties", 3), "where TensorProperties belongs"),
        (_parts(((0, 0), (1, 2)), ((2, 0), (1, 2))), "do not make up the whole"),  # a gap
        (_parts(((0, 0), (2, 2)), ((1, 0), (2, 2))), "do not make up the whole"),  # more than there is
        (_parts(((0, 0), (2, 2)), ((1, 0), (1, 2))), "do not make up the whole"),  # one over the other
        (_parts(((0, 0), (2, 2)), ((3, 0), (1, 2))), "do not make up the whole"),  # beyond the end
        (_parts(((0,), (6,))), "do not make up the whole"),  # of another dimension
        (_parts(*[((0, 0), (0, 0))] * 2000, ((0, 0), (3, 2))), "do not make up the whole"),  # far too many
    ],
)
def test_an_index_that_is_off_is_refused(index, change, message):
    tampered(index, change)
    with pytest.raises(CheckpointError, match=message):
        read_dcp_metadata(index)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(3), b"\x80\x02Nr\xff\xff\xff\x7f."])
def test_an_index_that_is_none(index, content):
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_dcp_metadata(index)
    index.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_dcp_metadata(index)


def test_state_cannot_be_set_on_what_the_index_reader_hands_out(index):
    """BUILD applied to a class must not reach anything that outlives the reading."""
    from torch.distributed.checkpoint.metadata import Metadata

    body = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x03\x00\x00\x00badK\x01s\x86b."
    assert "BUILD" in [opcode.name for opcode, _, _ in pickletools.genops(body)]
    index.write_bytes(body)
    with pytest.raises(CheckpointError):
        read_dcp_metadata(index)
    assert not hasattr(Metadata, "bad")
