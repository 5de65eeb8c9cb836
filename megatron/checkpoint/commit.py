"""How things become visible on disk: a directory or file appears whole, under its name, or not at all.

Everything a save writes passes through here, so that crash safety, manifests and fault points have one place. A
process that is killed leaves directories under names that no search takes for a checkpoint; the next save sweeps them.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron import faults
from megatron.checkpoint import manifest
from megatron.checkpoint.manifest import Description
from megatron.errors import StorageError
from megatron.files import atomic_write

_ASIDE = re.compile(r"(?P<name>.+)\.(?P<kind>staging|replaced|removed)-[0-9a-f]{32}")
_UNFINISHED_FILE = re.compile(r"(config\.yaml|latest_checkpointed_iteration\.txt|run_status\.json)\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class Staged:
    """A directory in the making, and the files in it whose content was hashed as it was written."""

    path: Path
    described: dict[Path, Description] = field(default_factory=dict)


@contextmanager
def staged(final: Path) -> Iterator[Staged]:
    """Yield an empty directory beside `final`; when the block ends well it gets its manifest, is flushed and takes
    the name `final`.

    A directory that had the name before is moved aside first and removed last: at no moment is neither there. If
    the block raises, the staged directory is removed and `final` is as it was.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    staging = _aside(final, "staging")
    try:
        faults.point("commit.make")
        staging.mkdir(parents=True)
        content = Staged(staging)
        yield content
        _seal(content)
        _take_name(staging, final)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def set_aside(directory: Path) -> str | None:
    """The name that `directory` had before a save moved it aside to replace it; None for any other directory."""
    match = _ASIDE.fullmatch(directory.name)
    return match["name"] if match and match["kind"] == "replaced" else None


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing a former file only once the new one is whole and on disk.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    try:
        faults.point("commit.replace_file")
        with atomic_write(str(path)) as file:
            file.write(text.encode())
        flush(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error


def remove(directory: Path) -> None:
    """Remove a checkpoint: at once as far as any search is concerned. Raises StorageError."""
    doomed = _aside(directory, "removed")
    try:
        faults.point("commit.remove")
        directory.rename(doomed)
    except OSError as error:
        raise StorageError(f"cannot remove {directory}: {error}") from error
    faults.point("commit.empty")
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path, name: str | None = None) -> None:
    """Remove what killed saves left in `root`; what was moved aside and never replaced gets its name back.

    With `name`, only what was to have it: others may be writing into `root`, too. What can't be removed now is left
    to the next save.

    Raises:
        StorageError: what lies in `root` cannot be listed.
    """
    try:
        paths = sorted(root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise StorageError(f"cannot list {root}: {error}") from error
    for path in paths:
        match = _ASIDE.fullmatch(path.name)
        if name is not None and (match is None or match["name"] != name):
            continue
        with suppress(OSError):
            if match and match["kind"] == "replaced" and not (root / match["name"]).exists():
                faults.point("commit.put_back")
                path.rename(root / match["name"])
            elif match:
                faults.point("commit.sweep")
                shutil.rmtree(path)
            elif _UNFINISHED_FILE.fullmatch(path.name):
                faults.point("commit.sweep_file")
                path.unlink()


def _seal(staged: Staged) -> None:
    content = manifest.build(staged.path, flush, staged.described)
    path = staged.path / manifest.MANIFEST
    faults.point("commit.manifest")
    path.write_bytes(content)
    flush(path)
    flush(staged.path)


def _take_name(staging: Path, final: Path) -> None:
    old = _aside(final, "replaced")
    replacing = final.exists()
    if replacing:
        faults.point("commit.move_aside")
        final.rename(old)
    try:
        faults.point("commit.rename")
        staging.rename(final)
    except OSError:
        if replacing:
            faults.point("commit.undo")
            old.rename(final)
        raise
    try:
        flush(final.parent)
    finally:
        if replacing:
            with suppress(OSError):  # the next save sweeps it
                faults.point("commit.drop_replaced")
                shutil.rmtree(old)


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{uuid.uuid4().hex}")


def flush(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    faults.point("commit.flush")
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
