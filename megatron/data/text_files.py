"""Reads documents out of JSON lines, text files and Parquet, in batches small enough to stay flat in memory.

`find_inputs` names the files, `read_batches` reads them without decoding (cheap, in one process), and
`Batch.documents` decodes (in any process); what can't be decoded comes out as a `BadRecord`, not as an error.
"""

import glob
import gzip
import io
import itertools
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron.errors import ConfigError, DataError

BATCH_BYTES = 512 * 1024
PARQUET_ROWS = 128
KNOWN_SUFFIXES = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".parquet")
FOREIGN_COMPRESSION = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz")
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """The wanted keys of one record, each a text or a list of sentences; `where` as in `BadRecord`."""

    where: str
    texts: dict[str, str | list[str]]


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read: `where` is file:line (rows are counted as lines, from 1)."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Batch(ABC):
    """Undecoded records; cheap to send to another process.

    `consumed`: how far the input files were read for it, in bytes as they lie on disk.
    """

    consumed: int

    @abstractmethod
    def documents(self, keys: Sequence[str]) -> Iterator[Document | BadRecord]:
        """Decode, in order. Every document has all `keys`, and texts that can be encoded as UTF-8."""


@dataclass(frozen=True)
class JsonLines(Batch):
    """Consecutive lines of one JSONL file, the first one being line `first`."""

    source: str
    first: int
    lines: list[bytes]

    def documents(self, keys: Sequence[str]) -> Iterator[Document | BadRecord]:
        """Blank lines are passed over."""
        for number, line in enumerate(self.lines, start=self.first):
            if line.strip():
                yield _wanted(_parse_json(line), keys, f"{self.source}:{number}")


@dataclass(frozen=True)
class TextFiles(Batch):
    """Whole text files, each one document."""

    sources: list[str]
    contents: list[bytes]

    def documents(self, keys: Sequence[str]) -> Iterator[Document | BadRecord]:
        (key,) = keys
        for source, content in zip(self.sources, self.contents, strict=True):
            text = _decode(content)
            if isinstance(text, _Unreadable):
                yield BadRecord(source, text.reason)
            else:
                yield Document(source, {key: text})


@dataclass(frozen=True)
class TableRows(Batch):
    """Consecutive rows of one Parquet file, the first one being row `first`."""

    source: str
    first: int
    rows: list[dict[str, Any]]

    def documents(self, keys: Sequence[str]) -> Iterator[Document | BadRecord]:
        for number, row in enumerate(self.rows, start=self.first):
            yield _wanted(row, keys, f"{self.source}:{number}")


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files named by `patterns` (files, directories, globs), each once, sorted within a pattern.

    Of a directory all files of a known kind count, however deep, hidden ones excepted. ConfigError where a
    pattern names nothing or a kind that can't be read.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and _is_offered(f.relative_to(path)))
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not files:
            kind = f"no {', '.join(KNOWN_SUFFIXES)} file in it" if path.is_dir() else "no such file"
            raise ConfigError(f"--input {pattern}: {kind}")
        found.update(dict.fromkeys(files))
    for path in found:
        if path.suffix in FOREIGN_COMPRESSION:
            raise ConfigError(f"--input {path}: {path.suffix} can't be read; decompress it, or use .gz")
    return list(found)


def check_keys(paths: Iterable[Path], keys: Sequence[str]) -> None:
    """ConfigError where a text file, which has one text and no names, is asked for several keys."""
    text = next((path for path in paths if _kind(path) == ".txt"), None)
    if text is not None and len(keys) != 1:
        raise ConfigError(f"{text} is one text without keys: give a single name in --json-keys")


def input_size(paths: Iterable[Path]) -> int:
    """Bytes on disk: what the `consumed` of all batches adds up to (0 for pipes)."""
    return sum(path.stat().st_size for path in paths)


def read_batches(paths: Iterable[Path], keys: Sequence[str], batch_bytes: int = BATCH_BYTES) -> Iterator[Batch]:
    """Read `paths` in order, about `batch_bytes` of content to a batch (a longer record is one of its own).

    DataError naming the file where it can't be opened, is truncated or lacks a column.
    """
    for kind, group in itertools.groupby(paths, key=_kind):
        if kind == ".txt":
            yield from _read_texts(group, batch_bytes)
        elif kind == ".parquet":
            for path in group:
                yield from _read_parquet(path, keys, batch_bytes)
        else:
            for path in group:
                yield from _read_jsonl(path, batch_bytes)


def _is_offered(path: Path) -> bool:
    return path.name.endswith(KNOWN_SUFFIXES) and not any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str:
    """.txt, .parquet, or .jsonl for everything else: pipes and corpora without an ending are JSON lines."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in (".txt", ".parquet") else ".jsonl"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int] | None]]:
    """Open, decompressing .gz; with it how far the file on disk was read, where that isn't what came out."""
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw)), raw.tell  # type: ignore[arg-type]
            else:
                yield raw, None
    except EOFError as err:
        raise DataError(f"{path} is truncated: the compressed data end too early") from err
    except (OSError, zlib.error) as err:
        raise DataError(f"{path} cannot be read: {getattr(err, 'strerror', None) or err}") from err


def _read_jsonl(path: Path, batch_bytes: int) -> Iterator[JsonLines]:
    lines: list[bytes] = []
    size, first, told = 0, 1, 0
    with _opened(path) as (stream, position):
        for line in stream:
            size += len(line)
            if first == 1 and not lines:
                line = line.removeprefix(UTF8_MARK)
            lines.append(line)
            if size >= batch_bytes:
                consumed = position() - told if position else size
                yield JsonLines(consumed, str(path), first, lines)
                told += consumed
                first += len(lines)
                lines, size = [], 0
        if lines:
            yield JsonLines(position() - told if position else size, str(path), first, lines)


def _read_texts(paths: Iterable[Path], batch_bytes: int) -> Iterator[TextFiles]:
    sources: list[str] = []
    contents: list[bytes] = []
    size = consumed = 0
    for path in paths:
        with _opened(path) as (stream, position):
            content = stream.read()
            consumed += position() if position else len(content)
        sources.append(str(path))
        contents.append(content.removeprefix(UTF8_MARK))
        size += len(content)
        if size >= batch_bytes:
            yield TextFiles(consumed, sources, contents)
            sources, contents, size, consumed = [], [], 0, 0
    if sources:
        yield TextFiles(consumed, sources, contents)


def _read_parquet(path: Path, keys: Sequence[str], batch_bytes: int) -> Iterator[TableRows]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as err:
        raise ConfigError(f"reading {path} needs the pyarrow library: pip install 'ee-llm[data]'") from err
    try:
        with parquet.ParquetFile(path) as file:
            missing = [key for key in keys if key not in file.schema_arrow.names]
            if missing:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column {missing[0]!r}; --json-keys may name: {columns}")
            pieces = file.iter_batches(batch_size=PARQUET_ROWS, columns=list(keys))
            rows = (row for piece in pieces for row in piece.to_pylist())
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            yield from _cut_rows(rows, str(path), share, batch_bytes)
    except (OSError, ValueError, pyarrow.ArrowException) as err:
        raise DataError(f"{path} cannot be read as Parquet: {err}") from err


def _cut_rows(
    rows: Iterable[dict[str, Any]], source: str, bytes_per_row: float, batch_bytes: int
) -> Iterator[TableRows]:
    pending: list[dict[str, Any]] = []
    size, first, told = 0, 1, 0

    def batch() -> TableRows:
        upto = round((first - 1 + len(pending)) * bytes_per_row)
        return TableRows(upto - told, source, first, pending)

    for row in rows:
        pending.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str | list))
        if size >= batch_bytes:
            done = batch()
            yield done
            told += done.consumed
            first += len(pending)
            pending, size = [], 0
    if pending:
        yield batch()


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _decode(content: bytes) -> str | _Unreadable:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        return _Unreadable(f"not UTF-8 (byte {err.start})")


def _parse_json(line: bytes) -> Any:
    text = _decode(line)
    if isinstance(text, _Unreadable):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        return _Unreadable(f"not JSON: {err.msg} (column {err.colno})")
    except (ValueError, RecursionError) as err:
        return _Unreadable(f"not JSON that can be read: {err}")


def _wanted(record: Any, keys: Sequence[str], where: str) -> Document | BadRecord:
    """The wanted keys of a decoded record, or why they can't be had."""
    if isinstance(record, _Unreadable):
        return BadRecord(where, record.reason)
    if not isinstance(record, dict):
        return BadRecord(where, "not a JSON object")
    for key in keys:
        if key not in record:
            return BadRecord(where, f"no key {key!r}")
        value = record[key]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            return BadRecord(where, f"{key!r} is neither a text nor a list of texts")
        if not all(map(_is_encodable, texts)):
            return BadRecord(where, f"{key!r} holds half a surrogate pair, which is no character")
    return Document(where, {key: record[key] for key in keys})


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
