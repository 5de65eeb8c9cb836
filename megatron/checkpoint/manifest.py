"""The manifest of a checkpoint: size and SHA-256 of every file in it, and the check against it.

A directory with a manifest was written to its end, one that passes `verify` is bit for bit what was written. The
hashes guard against accidents; against malice there are the restricted readers (safe.py).
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypedDict

from megatron.errors import CheckpointError
from megatron.files import read_small

MANIFEST = "manifest.json"
_FORMAT = "ee-llm-manifest"
_BLOCK = 1 << 20
# Directories whose content is read as it lies there: what the manifest doesn't list would be, too.
_CLOSED = ("tensors", "tokenizer")
_LARGEST = 64 << 20  # bytes of a manifest


class Description(TypedDict):
    """What the manifest says about a file; size in bytes."""

    sha256: str
    size: int


def build(directory: Path, flush: Callable[[Path], None], described: Mapping[Path, Description]) -> bytes:
    """The manifest of what lies in `directory`, after `flush` was called for each file and each directory below.

    Files that aren't `described` are read. Flushing and hashing go on side by side: one waits for the disk, the
    other for the processor. Raises FileNotFoundError where a described file has vanished: what is left is no whole.
    """
    files, folders = _tree(directory)
    if lost := sorted(described.keys() - set(files.values())):
        raise FileNotFoundError(errno.ENOENT, "vanished while it was being saved", str(lost[0]))
    with ThreadPoolExecutor(max_workers=4) as pool:
        flushed = [pool.submit(flush, path) for path in (*files.values(), *folders)]
        found = pool.map(lambda path: described.get(path) or describe(path), files.values())
        entries = dict(zip(files, found, strict=True))
        for result in flushed:
            result.result()
    return _encode(entries)


def verify(directory: Path) -> dict[str, int]:
    """Compare `directory` with its manifest; returns file name -> size in bytes.

    Raises:
        CheckpointError: there is no manifest, it is damaged, or a file is missing, not as it was written, or extra
            where it might be read; the message names all such files.
    """
    entries, files = _read(directory), _files(directory)
    problems = [f"{name} is missing" for name in entries.keys() - files.keys()]
    extra = (name for name in files.keys() - entries.keys() if name.split("/")[0] in _CLOSED)
    problems += [f"{name} does not belong there" for name in extra]
    problems += _differences(entries, files)
    if problems:
        raise CheckpointError(f"{directory} is damaged: {'; '.join(sorted(problems))}")
    return {name: entry["size"] for name, entry in sorted(entries.items())}


def unlisted(directory: Path) -> list[str]:
    """Files that are no part of the checkpoint in `directory`. Raises CheckpointError where it has no manifest."""
    return sorted(_files(directory).keys() - _read(directory).keys())


def _files(directory: Path) -> dict[str, Path]:
    """What lies in `directory`, by name relative to it, the manifest left out."""
    try:
        files, _ = _tree(directory)
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{directory} is damaged: what lies in it cannot be listed ({error})") from error
    files.pop(MANIFEST, None)
    return files


def _differences(entries: dict[str, Description], files: dict[str, Path]) -> Iterator[str]:
    names = sorted(entries.keys() & files.keys())
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda name: _difference(entries[name], files[name]), names)
        yield from (f"{name} {difference}" for name, difference in zip(names, found, strict=True) if difference)


def _difference(entry: Description, path: Path) -> str | None:
    """How a file is not as it was written; None if it is."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "is no ordinary file"
        if status.st_size != entry["size"]:
            return f"has {status.st_size:,} bytes instead of {entry['size']:,}"
        same = describe(path)["sha256"] == entry["sha256"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "has another content than was written"


def _tree(directory: Path) -> tuple[dict[str, Path], list[Path]]:
    """Files by their name relative to `directory`, and all directories, it included, deepest first."""
    paths = sorted(directory.rglob("*"), reverse=True)
    files = {path.relative_to(directory).as_posix(): path for path in paths if not path.is_dir() or path.is_symlink()}
    return files, [*(path for path in paths if path.is_dir() and not path.is_symlink()), directory]


def describe(path: Path) -> Description:
    """Read a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0, opener=_no_link) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"sha256": digest.hexdigest(), "size": size}


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _encode(entries: dict[str, Description]) -> bytes:
    """One way to write each manifest, closed by a hash of itself: a changed byte anywhere shows."""
    plain = {"files": entries, "format": _FORMAT, "version": 1}
    own = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return (json.dumps(plain | {"sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def _read(directory: Path) -> dict[str, Description]:
    path = directory / MANIFEST
    try:
        content = read_small(path, _LARGEST)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} was not written to its end: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{directory} is not whole: {MANIFEST} cannot be read ({error.strerror})") from error
    try:
        found = json.loads(content)
        entries = {
            _plain_name(name): {"sha256": str(entry["sha256"]), "size": int(entry["size"])}
            for name, entry in found["files"].items()
        }
    except (ValueError, ArithmeticError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory} is damaged: {MANIFEST} is none ({error})") from error
    if found.get("format") == _FORMAT and found.get("version") != 1:
        raise CheckpointError(f"{path} has version {found.get('version')}; this program reads 1: update it")
    if _encode(entries) != content:
        raise CheckpointError(f"{directory} is damaged: {MANIFEST} is not as it was written")
    return entries


def _plain_name(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"it names {name!r}, outside its directory")
    return name
