"""The .bin/.idx format: exact bytes, exact reads, and every kind of broken file refused by name."""

import errno
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed import DTYPES, HEADER, IndexedDataset, IndexedWriter, best_dtype
from megatron.errors import DataError, StorageError

IDX_LENGTHS = HEADER.size


def write(prefix: Path, documents: list, dtype: type | str = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "some", [[1, 2, 3], [], [4, 5], [6]])


def patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_bytes_of_a_small_pair(prefix: Path) -> None:
    """The layout, spelt out by hand: an empty document is a border without a sequence."""
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    assert Path(f"{prefix}.idx").read_bytes() == b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<QBQQ", 1, 8, 3, 5),
            struct.pack("<3i", 3, 2, 1),
            struct.pack("<3q", 0, 6, 10),
            struct.pack("<5q", 0, 1, 1, 2, 3),
        ]
    )


def test_reading(prefix: Path) -> None:
    data = IndexedDataset(prefix)
    assert len(data) == 3 and data.dtype == np.uint16 and data.modes is None
    assert [data[i].tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6]]
    assert data.get(0, 1).tolist() == [2, 3]
    assert data.get(0, 1, 1).tolist() == [2]
    assert data.get(0, 3).tolist() == []
    assert data.byte_offset(1, 1) == 8
    for arguments in [(3,), (-1,), (0, 4), (0, -1), (0, 2, 2), (0, 0, -1)]:
        with pytest.raises(IndexError):
            data.get(*arguments)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: np.dtype) -> None:
    data = IndexedDataset(write(tmp_path / "x", [[1, 100], [7]], dtype))
    assert data.dtype == dtype and data[0].dtype == dtype
    assert data[0].tolist() == [1, 100] and data[1].tolist() == [7]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=4), max_size=8))
def test_any_documents_survive(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    """Documents of sequences, empty ones of both kinds included, come back as they were; so does a merge."""
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for document in documents:
            writer.add_document([token for sequence in document for token in sequence], map(len, document))
    with IndexedWriter(tmp_path / "twice", np.uint16) as writer:
        assert writer.add_index(tmp_path / "a") == len(documents)
        writer.add_index(tmp_path / "a")
    for name, expected in (("a", documents), ("twice", documents * 2)):
        data = IndexedDataset(tmp_path / name)
        assert [data[i].tolist() for i in range(len(data))] == [s for document in expected for s in document]
        assert np.diff(data.document_indices).tolist() == [len(document) for document in expected]


def test_best_dtype() -> None:
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == best_dtype(None) == np.int32


def test_pickle_holds_no_tokens(prefix: Path) -> None:
    data = IndexedDataset(prefix)
    content = pickle.dumps(data)
    assert len(content) < 500
    assert pickle.loads(content)[0].tolist() == [1, 2, 3]


def test_forked_readers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Parent and child share the file descriptor; neither moves the other's place."""
    data = IndexedDataset(write(tmp_path / "x", [[i] * 50 for i in range(200)]))
    child = os.fork()
    right = all((data[i % 200] == i % 200).all() for i in range(2000))
    if child == 0:
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right


def test_modes_of_multimodal_files_are_tolerated(prefix: Path) -> None:
    with open(f"{prefix}.idx", "ab") as file:
        file.write(bytes([0, 1, 0]))
    data = IndexedDataset(prefix)
    assert data.modes is not None and data.modes.tolist() == [0, 1, 0]
    assert data[2].tolist() == [6]
    with pytest.raises(DataError, match="multimodal"), IndexedWriter(f"{prefix}2", np.uint16) as writer:
        writer.add_index(prefix)


def test_writer_refuses_what_would_wrap(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        for tokens in ([65536], [-1], np.array([3, 70000])):
            with pytest.raises(DataError, match=r"document 1: token .* does not fit uint16"):
                writer.add_document(tokens)
        with pytest.raises(DataError, match="not integers"):
            writer.add_document([0.5])
        for lengths in ([1], [3], [3, -1]):
            with pytest.raises(DataError, match="sequences of"):
                writer.add_document([1, 2], lengths)
    assert len(IndexedDataset(tmp_path / "x")) == 1


def test_merge_refuses_another_dtype(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint16 tokens and cannot join int32"):
        with IndexedWriter(tmp_path / "y", np.int32) as writer:
            writer.add_index(prefix)


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="complex64"):
        IndexedWriter(tmp_path / "x", np.complex64)


def test_failure_while_writing_keeps_the_old_pair(prefix: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([9] * 10)
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("failing", ["fsync", "replace", "unlink"])
def test_no_mixed_pair_after_a_failed_finish(prefix: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call of the last step fails, what lies there is the old pair, the new one, or visibly incomplete."""
    calls = 0
    real = getattr(os, failing)

    def fail_at(nth: int):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call

    for nth in (1, 2):
        calls = 0
        writer = IndexedWriter(prefix, np.uint16)
        writer.add_document([7] * 20)
        with monkeypatch.context() as patched:
            patched.setattr(os, failing, fail_at(nth))
            if failing == "unlink" and nth == 2:
                break  # the second removal is of our own temporary file
            with pytest.raises(StorageError, match="No space left"):
                writer.finalize()
        writer.discard()
        assert not [path for path in prefix.parent.iterdir() if path.suffix == ".tmp"]
        try:
            data = IndexedDataset(prefix)
        except DataError as error:
            assert "does not exist" in str(error)
        else:
            assert [data[i].tolist() for i in range(len(data))] in ([[1, 2, 3], [4, 5], [6]], [[7] * 20])


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        IndexedWriter(tmp_path / "file" / "x", np.uint16)


# Broken files: each must be refused on opening, before a step is taken, with its name and place.


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_file(prefix: Path, ending: str) -> None:
    os.unlink(f"{prefix}{ending}")
    with pytest.raises(DataError, match=rf"some\{ending} does not exist.*without its ending"):
        IndexedDataset(prefix)


def test_empty_index(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"some\.idx is empty or truncated: 0 bytes, its header takes 34"):
        IndexedDataset(prefix)


def test_index_cut_at_every_byte(prefix: Path) -> None:
    content = Path(f"{prefix}.idx").read_bytes()
    for size in range(len(content)):
        Path(f"{prefix}.idx").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"some\.idx is .*truncated"):
            IndexedDataset(prefix)


def test_bin_cut_at_every_byte(prefix: Path) -> None:
    content = Path(f"{prefix}.bin").read_bytes()
    for size in range(len(content)):
        Path(f"{prefix}.bin").write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"some\.bin is truncated: its index needs 12 bytes, it has {size}"):
            IndexedDataset(prefix)


def test_longer_bin_is_said(prefix: Path, messages: list[str]) -> None:
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"junk")
    assert IndexedDataset(prefix)[2].tolist() == [6]
    assert any("4 bytes more than its index" in message for message in messages)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"TNTIDX\x00\x00\x00", "is not an index file"),
        (9, struct.pack("<Q", 2), "format version 2; only version 1"),
        (17, b"\x00", "dtype code 0 "),
        (17, b"\x09", "dtype code 9 "),
        (18, struct.pack("<Q", 2**62), "is truncated"),
        (18, struct.pack("<Q", 2), "12 bytes follow its last document border"),
        (26, struct.pack("<Q", 0), "bytes follow its last document border"),
        (IDX_LENGTHS, struct.pack("<i", -3), "sequence 0 has -3 tokens"),
        (IDX_LENGTHS, struct.pack("<i", 4), "sequence 1 has 2 tokens from byte 6 on, where .* at byte 8"),
        (IDX_LENGTHS + 12, struct.pack("<q", 2), "sequence 0 has 3 tokens from byte 2 on, where .* at byte 0"),
        (IDX_LENGTHS + 20, struct.pack("<q", 12), "sequence 1 has 2 tokens from byte 12 on"),
        (IDX_LENGTHS + 36, struct.pack("<q", 1), "document borders do not run from 0 to its 3"),
        (IDX_LENGTHS + 44, struct.pack("<q", 3), "document 1 ends before it starts"),
        (IDX_LENGTHS + 68, struct.pack("<q", 2), "document borders do not run from 0 to its 3"),
    ],
)
def test_damaged_index(prefix: Path, offset: int, content: bytes, reason: str) -> None:
    patch(f"{prefix}.idx", offset, content)
    with pytest.raises(DataError, match=rf"some\.idx .*{reason}"):
        IndexedDataset(prefix)


def test_damage_beyond_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.indexed.CHECK_CHUNK", 4)
    path = write(tmp_path / "x", [[i] * (i % 3) for i in range(23)])
    data = IndexedDataset(path)
    assert sum(map(len, (data[i] for i in range(len(data))))) == sum(i % 3 for i in range(23))
    patch(f"{path}.idx", IDX_LENGTHS + 4 * len(data) + 8 * 9, struct.pack("<q", 0))
    with pytest.raises(DataError, match="sequence 9 has"):
        IndexedDataset(path)


def test_file_cut_while_in_use(prefix: Path) -> None:
    """A shard that shrinks under a running job: an error at the sample, with file and byte, and no signal."""
    data = IndexedDataset(prefix)
    os.truncate(f"{prefix}.bin", 7)
    assert data[0].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"some\.bin ends before byte 7, where 3 more bytes"):
        data.get(1)


def test_unreadable_file_while_in_use(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = IndexedDataset(prefix)

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(DataError, match=r"some\.bin cannot be read at byte 6: Input/output error"):
        data.get(1)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    """As the real one: what the buffer holds cannot be written when the file is closed, either."""

    class Full:
        def __init__(self, file) -> None:
            self.fileno, self.tell, self.really_close = file.fileno, file.tell, file.close

        def write(self, _content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.really_close()
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = IndexedWriter(str(tmp_path / "x"), np.dtype(np.uint16))
    writer._bin = Full(writer._bin)
    with pytest.raises(StorageError, match="No space left"), writer:
        writer.add_document([1, 2, 3])
    assert list(tmp_path.iterdir()) == []
