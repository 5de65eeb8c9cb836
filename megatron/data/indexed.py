"""Megatron's `.bin`/`.idx` token files: a checked, lazy reader and a streaming, crash-safe writer.

A prefix `P` names the pair `P.bin` (tokens back to back) and `P.idx` (their layout). Neither side ever holds a
corpus in memory, and every broken file is a `DataError` that names it.
"""

import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from megatron.errors import DataError, StorageError
from megatron.files import atomic_write, temporary_name
from megatron.logs import get_logger

logger = get_logger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences S, of document borders D
DTYPES = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
CHECK_CHUNK = 1 << 22  # sequences whose layout is checked at a time: bounds the memory of opening a file
MERGE_CHUNK = 1 << 24  # bytes copied at a time


def best_dtype(vocab_size: int | None) -> np.dtype:
    """The dtype Megatron's preprocessing picks: uint16 below 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < 65500 else DTYPES[4]


class IndexedDataset:
    """Sequences of tokens, read from `prefix.bin` as they are asked for.

    Attributes (the arrays are memory-mapped, read-only): `dtype`; `lengths` int32 [S], tokens per sequence;
    `pointers` int64 [S], byte offsets into `.bin`; `document_indices` int64 [D], the sequence at which each
    document starts, then S; `modes` int8 [S] of multimodal files, else None.

    The whole index is checked once, on opening. Tokens come by `pread`: it shares a file descriptor safely
    across forks, and a `.bin` that shrinks or fails under a running job is an error here, where a memory map
    would kill the process. Pickles as its prefix alone, so it can be sent to worker processes.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Open and check a pair of files; raises DataError if either is missing or damaged."""
        self.prefix = os.fspath(prefix)
        self._open()
        self._check_documents()
        self._check_sequences()

    @property
    def bin_path(self) -> str:
        return self.prefix + ".bin"

    @property
    def idx_path(self) -> str:
        return self.prefix + ".idx"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """All tokens of sequence `index` (0 ≤ index < S), a read-only array of `dtype`."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (default: all that are left) of sequence `index` from token `offset` on."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        available = int(self.lengths[index]) - offset
        if length is None:
            length = available
        if offset < 0 or not 0 <= length <= available:
            raise IndexError(f"tokens {offset}+{length} of sequence {index} in {self.prefix}")
        return self.read_at(self.byte_offset(index, offset), length)

    def byte_offset(self, index: int, offset: int = 0) -> int:
        """Where token `offset` of sequence `index` starts in `.bin`."""
        return int(self.pointers[index]) + offset * self.dtype.itemsize

    def read_at(self, position: int, count: int) -> np.ndarray:
        """`count` tokens from byte `position` of `.bin` on."""
        remaining = count * self.dtype.itemsize
        pieces: list[bytes] = []
        while remaining > 0:  # one pread gives at most 2 GiB
            try:
                pieces.append(os.pread(self._bin.fileno(), remaining, position))
            except OSError as error:
                raise DataError(f"{self.bin_path} cannot be read at byte {position}: {error.strerror}") from error
            if not pieces[-1]:
                raise DataError(
                    f"{self.bin_path} ends before byte {position}, where {remaining} more bytes were expected: "
                    "it was cut while in use"
                )
            position += len(pieces[-1])
            remaining -= len(pieces[-1])
        return np.frombuffer(b"".join(pieces) if len(pieces) != 1 else pieces[0], self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.prefix = state["prefix"]
        self._open()

    def _open(self) -> None:
        for path in (self.idx_path, self.bin_path):
            if not os.path.isfile(path):
                raise DataError(f"{path} does not exist: a data prefix names a .bin/.idx pair, without its ending")
        try:
            self._bin = open(self.bin_path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
            # An empty file cannot be mapped; it is told apart from a cut one by the header check.
            size = os.path.getsize(self.idx_path)
            index = np.memmap(self.idx_path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise DataError(f"{error.filename or self.prefix} cannot be opened: {error.strerror}") from error
        self._slice_index(index)

    def _slice_index(self, index: np.ndarray) -> None:
        """Check the header and set the arrays as views of the mapped file."""
        path = self.idx_path
        if len(index) < HEADER.size:
            raise DataError(f"{path} is empty or truncated: {len(index)} bytes, its header takes {HEADER.size}")
        magic, version, code, sequences, borders = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise DataError(f"{path} is not an index file: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{path} has format version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            raise DataError(f"{path} has dtype code {code} (byte 17); known are 1 to {len(DTYPES)}")
        needed = HEADER.size + 12 * sequences + 8 * borders
        if len(index) < needed:
            raise DataError(
                f"{path} is truncated: {sequences} sequences and {borders} document borders take {needed} "
                f"bytes, it has {len(index)}"
            )
        if len(index) not in (needed, needed + sequences):
            raise DataError(f"{path} is damaged: {len(index) - needed} bytes follow its last document border")
        self.dtype = DTYPES[code]
        lengths_end = HEADER.size + 4 * sequences
        pointers_end = lengths_end + 8 * sequences
        self.lengths = index[HEADER.size : lengths_end].view("<i4")
        self.pointers = index[lengths_end:pointers_end].view("<i8")
        self.document_indices = index[pointers_end:needed].view("<i8")
        self.modes = index[needed:].view(np.int8) if len(index) > needed else None

    def _check_documents(self) -> None:
        borders = self.document_indices
        if not len(borders) or borders[0] != 0 or borders[-1] != len(self):
            raise DataError(
                f"{self.idx_path} is damaged: its document borders do not run from 0 to its {len(self)} sequences"
            )
        for start in range(0, len(borders), CHECK_CHUNK):
            falling = np.flatnonzero(np.diff(borders[start : start + CHECK_CHUNK + 1]) < 0)
            if falling.size:
                raise DataError(f"{self.idx_path} is damaged: document {start + falling[0]} ends before it starts")

    def _check_sequences(self) -> None:
        """Sequences must lie back to back from byte 0 on, and end within `.bin`."""
        end = 0
        for start in range(0, len(self), CHECK_CHUNK):
            lengths = self.lengths[start : start + CHECK_CHUNK].astype(np.int64)
            expected = end + self.dtype.itemsize * np.concatenate(([0], np.cumsum(lengths)))
            wrong = np.flatnonzero((self.pointers[start : start + CHECK_CHUNK] != expected[:-1]) | (lengths < 0))
            if wrong.size:
                at = int(wrong[0])
                raise DataError(
                    f"{self.idx_path} is damaged: sequence {start + at} has {lengths[at]} tokens from byte "
                    f"{self.pointers[start + at]} on, where the one before it ends at byte {expected[at]}"
                )
            end = int(expected[-1])
        actual = os.fstat(self._bin.fileno()).st_size
        if actual < end:
            raise DataError(f"{self.bin_path} is truncated: its index needs {end} bytes, it has {actual}")
        if actual > end:
            logger.warning("%s has %d bytes more than its index names; they are not used", self.bin_path, actual - end)


@contextmanager
def _storing(path: str) -> Iterator[None]:
    """Turn a failed file operation into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


class IndexedWriter:
    """Writes `prefix.bin` and `prefix.idx` document by document; use it in a `with` block.

    Tokens stream to a temporary file; memory holds 12 bytes a document at most. `finalize` (or the end of the
    block) puts both files in place; an exception in the block leaves what was there before.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type | str) -> None:
        """`dtype`: one of the eight of the format, see `best_dtype`. Raises StorageError, DataError."""
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {known: code for code, known in DTYPES.items()}
        if self.dtype not in codes:
            raise DataError(f"{np.dtype(dtype)} tokens have no code in the .idx format")
        self._code = codes[self.dtype]
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._temporary = temporary_name(self.prefix + ".bin")
        with _storing(self._temporary):
            os.makedirs(os.path.dirname(self.prefix) or ".", exist_ok=True)
            self._bin = open(self._temporary, "wb")  # noqa: SIM115 (closed by finalize or discard)

    def add_document(self, tokens: Sequence[int] | np.ndarray, sequence_lengths: Iterable[int] | None = None) -> None:
        """Append one document, by default as a single sequence; an empty one adds a document border alone.

        Args:
            tokens: the document's tokens, 1-D.
            sequence_lengths: tokens of each of its sequences (sentences); their sum is the number of tokens.
        """
        values = np.asarray(tokens)
        if sequence_lengths is None:
            sequence_lengths = [values.size] if values.size else []
        lengths = list(sequence_lengths)
        if values.ndim != 1 or sum(lengths) != values.size or min(lengths, default=0) < 0:
            raise DataError(f"document {len(self._documents) - 1}: {values.shape} tokens, sequences of {lengths}")
        if max(lengths, default=0) > np.iinfo(np.int32).max:
            raise DataError(f"document {len(self._documents) - 1}: a sequence has at most 2^31 - 1 tokens")
        self._check_range(values)
        with _storing(self._temporary):
            self._bin.write(values.astype(self.dtype).tobytes())
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def add_index(self, prefix: str | os.PathLike[str]) -> int:
        """Append all documents of another pair of files of the same dtype; returns how many."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{other.idx_path} holds {other.dtype} tokens and cannot join {self.dtype} ones")
        if other.modes is not None:
            raise DataError(f"{other.idx_path} is a multimodal index; merging would lose its modes")
        used = other.byte_offset(len(other) - 1, int(other.lengths[-1])) if len(other) else 0
        start = len(self._lengths)
        for position in range(0, used, MERGE_CHUNK):
            tokens = other.read_at(position, min(MERGE_CHUNK, used - position) // self.dtype.itemsize)
            with _storing(self._temporary):
                self._bin.write(tokens.tobytes())
        self._lengths.frombytes(other.lengths.astype(np.int32).tobytes())
        self._documents.frombytes((other.document_indices[1:] + start).astype(np.int64).tobytes())
        return len(other.document_indices) - 1

    def finalize(self) -> None:
        """Write the index and put both files in place."""
        with _storing(self.prefix + ".bin"):
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._bin.close()
        with _storing(self.prefix + ".idx"), atomic_write(self.prefix + ".idx") as index:
            lengths = np.frombuffer(self._lengths, np.int32)
            documents = np.frombuffer(self._documents, np.int64)
            index.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents)))
            index.write(lengths.astype("<i4").tobytes())
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            index.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
            index.write(documents.astype("<i8").tobytes())
            # From here to the rename of the index nothing must look whole: a new .bin under an old .idx would.
            with suppress(FileNotFoundError):
                os.unlink(self.prefix + ".idx")
            os.replace(self._temporary, self.prefix + ".bin")

    def discard(self) -> None:
        """Forget what was added and remove the temporary file; harmless after `finalize`."""
        with suppress(OSError):  # what is left in its buffer may not fit on the disk
            self._bin.close()
        with suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finalize()
        finally:
            self.discard()

    def _check_range(self, values: np.ndarray) -> None:
        """Integers that the dtype cannot hold would wrap to other tokens without a word."""
        if self.dtype.kind == "f" or not values.size:
            return
        limits = np.iinfo(self.dtype)
        if values.dtype.kind not in "iu":
            raise DataError(f"document {len(self._documents) - 1}: tokens are {values.dtype}, not integers")
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            wrong = low if low < limits.min else high
            raise DataError(
                f"document {len(self._documents) - 1}: token {wrong} does not fit {self.dtype}; "
                "the vocabulary needs a wider dtype"
            )
