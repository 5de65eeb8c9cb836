"""How things become visible on disk: a directory or file appears whole, under its name, or not at all.

Everything a save writes passes through here, so that crash safety, manifests and fault points have one place.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import StorageError
from megatron.files import atomic_write

_REPLACED = re.compile(r"(?P<name>.+)\.replaced-[0-9a-f]{32}")


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside `final`; when the block ends well it is flushed and takes the name `final`.

    A directory that had the name before is moved aside first and removed last: at no moment is neither there. If
    the block raises, the staged directory is removed and `final` is as it was.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    staging = final.with_name(f"{final.name}.staging-{uuid.uuid4().hex}")
    try:
        staging.mkdir(parents=True)
        yield staging
        _flush_tree(staging)
        _take_name(staging, final)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def set_aside(directory: Path) -> str | None:
    """The name that `directory` had before a save moved it aside to replace it; None for any other directory."""
    match = _REPLACED.fullmatch(directory.name)
    return match["name"] if match else None


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing a former file only once the new one is whole and on disk.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    try:
        with atomic_write(str(path)) as file:
            file.write(text.encode())
        _flush(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error


def _take_name(staging: Path, final: Path) -> None:
    old = final.with_name(f"{final.name}.replaced-{uuid.uuid4().hex}")
    replacing = final.exists()
    if replacing:
        final.rename(old)
    try:
        staging.rename(final)
    except OSError:
        if replacing:
            old.rename(final)
        raise
    _flush(final.parent)
    if replacing:
        shutil.rmtree(old, ignore_errors=True)


def _flush_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _flush(path)


def _flush(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
