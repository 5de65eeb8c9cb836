"""Which checkpoint lies in a directory: format by content, the newest whole one, the tracker file as a mere hint."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.checkpoint import manifest
from megatron.checkpoint.commit import set_aside
from megatron.checkpoint.manifest import MANIFEST
from megatron.errors import CheckpointError
from megatron.files import read_small
from megatron.logs import get_logger

NATIVE: Literal["native"] = "native"
MEGATRON: Literal["megatron"] = "megatron"

FACTS = "facts.json"
TENSORS = "tensors"
INDEX = f"{TENSORS}/.metadata"
TOKENIZER = "tokenizer"
LEGACY_FILE = "model_optim_rng.pt"
RANK_DIRECTORY = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"

_OURS = {MANIFEST, FACTS, TENSORS, TOKENIZER}
_LARGEST_TRACKER = 4096  # bytes
_ITERATION = re.compile(r"iter_(\d{7,})")
_log = get_logger(__name__)

Format = Literal["native", "megatron"]


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk. `iteration` is 0 for a release, which has no training history."""

    directory: Path
    iteration: int
    format: Format
    release: bool = False


def iteration_name(iteration: int) -> str:
    """The directory of an iteration, as Megatron-LM names it."""
    return f"iter_{iteration:07d}"


def format_of(directory: Path) -> Format | None:
    """The format of the checkpoint in `directory`, told by its files; None if there is none.

    Two of three files make a native one: it may be damaged, and others have a manifest.json, too. So does the name of
    an iteration with nothing foreign below it, which was ours and lost the rest.
    """
    if sum((directory / name).is_file() for name in (MANIFEST, FACTS, INDEX)) >= 2:
        return NATIVE
    if directory.is_dir() and any(directory.glob(f"mp_rank_*/{LEGACY_FILE}")):
        return MEGATRON
    name = set_aside(directory) or directory.absolute().name
    if _ITERATION.fullmatch(name) and directory.is_dir() and {path.name for path in directory.iterdir()} <= _OURS:
        return NATIVE
    return None


def recognise(root: Path, iteration: int | None = None) -> Found:
    """The checkpoint to load from `root`: a directory of checkpoints, or one checkpoint itself.

    Without `iteration` the tracker decides; where it is missing or names nothing, the newest complete iteration
    does, and a warning says so.

    Raises:
        CheckpointError: there is no such checkpoint; the message says what was looked for.
    """
    found = recognise_if_any(root, iteration)
    if found is None:
        state = "is no directory" if not root.is_dir() else f"holds no {TRACKER} and no checkpoint iter_*"
        raise CheckpointError(f"no checkpoint in {root}: it {state}. Give --load the directory that --save had")
    return found


def recognise_if_any(root: Path, iteration: int | None = None) -> Found | None:
    """As `recognise`, but None where `root` holds no checkpoint at all and none was asked for by number."""
    with _readable(root):
        return _recognise(root, iteration)


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error}") from error


def _recognise(root: Path, iteration: int | None) -> Found | None:
    if kind := format_of(root):
        return _whole(_itself(root, kind, iteration))
    by_iteration = iterations(root)
    if iteration is not None:
        if iteration not in by_iteration:
            there = ", ".join(map(str, sorted(by_iteration))) or "none"
            raise CheckpointError(
                f"{root / iteration_name(iteration)} holds no complete checkpoint. Iterations there: {there}"
            )
        return _whole(by_iteration[iteration])
    release = root / RELEASE
    tracked = _tracked(root)
    if tracked == RELEASE and (kind := format_of(release)):
        return Found(release, 0, kind, release=True)
    if by_iteration:
        return _newest(root, by_iteration, tracked)
    if kind := format_of(release):
        return Found(release, 0, kind, release=True)
    if tracked is not None:
        raise CheckpointError(f"{root / TRACKER} says {tracked!r}, but {root} holds no complete checkpoint")
    return None


def _newest(root: Path, by_iteration: dict[int, Found], tracked: int | str | None) -> Found:
    """The newest whole checkpoint. A damaged one is named and passed over.

    Megatron's format has no manifest: of those that are newer than the tracker says nobody knows whether they were
    written to their end, so they don't count.
    """
    damaged = []
    for number in sorted(by_iteration, reverse=True):
        candidate = by_iteration[number]
        if candidate.format == MEGATRON and tracked in by_iteration and number > int(tracked):
            continue
        try:
            found = _whole(candidate)
        except CheckpointError as error:
            _log.warning("%s; looking for an older one", error)
            damaged.append(str(error))
            continue
        if found.iteration != tracked and not damaged:
            said = "is missing" if tracked is None else f"says {tracked!r}"
            _log.warning("%s %s: taking the newest whole iteration, %d.", root / TRACKER, said, found.iteration)
        return found
    raise CheckpointError(f"no intact checkpoint in {root}:\n  " + "\n  ".join(damaged))


def _whole(found: Found) -> Found:
    """`found`, once its files are known to be what was written. Raises CheckpointError."""
    if found.format == NATIVE:
        manifest.verify(found.directory)
    return found


def checkpoints_in(directory: Path) -> list[Found]:
    """The checkpoint that `directory` is, or all those in it, oldest first; damaged ones too.

    Raises CheckpointError where it cannot be read.
    """
    with _readable(directory):
        if kind := format_of(directory):
            return [_itself(directory, kind, None)]
        release = directory / RELEASE
        first = [Found(release, 0, kind, release=True)] if (kind := format_of(release)) else []
        return first + [found for _, found in sorted(iterations(directory).items())]


def iterations(root: Path) -> dict[int, Found]:
    """Every checkpoint in `root` by iteration; damaged ones too.

    One that a crash left moved aside counts where nothing replaced it. Raises CheckpointError where `root` cannot be
    read.
    """
    found: dict[int, Found] = {}
    with _readable(root):
        for iteration, directory in _numbered(root):
            aside = set_aside(directory) is not None
            if (kind := format_of(directory)) and not (aside and iteration in found):
                found[iteration] = Found(directory, iteration, kind)
    return found


def foreign(root: Path) -> dict[int, Format | None]:
    """What has an iteration's name in `root` and is no native checkpoint: a save never replaces it. Its format.

    Raises CheckpointError where `root` cannot be read.
    """
    with _readable(root):
        kinds = {number: format_of(path) for number, path in _numbered(root) if set_aside(path) is None}
    return {number: kind for number, kind in kinds.items() if kind != NATIVE}


def _numbered(root: Path) -> Iterator[tuple[int, Path]]:
    """All in `root` that has an iteration's name, or had it before a save moved it aside."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if match := _ITERATION.fullmatch(set_aside(path) or path.name):
            yield int(match[1]), path


def _tracked(root: Path) -> int | str | None:
    """What the tracker says: an iteration, "release" or anything else it holds; None if there is no tracker."""
    try:
        text = read_small(root / TRACKER, _LARGEST_TRACKER).decode("utf-8", errors="replace").strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text


def _itself(directory: Path, kind: Format, wanted: int | None) -> Found:
    """`directory` is a checkpoint; its number comes from its name, 0 if that tells none."""
    match = _ITERATION.fullmatch(set_aside(directory) or directory.resolve().name)
    iteration = int(match[1]) if match else 0
    if wanted is not None and wanted != iteration:
        raise CheckpointError(f"{directory} is iteration {iteration}, not {wanted}: give --load its parent directory")
    return Found(directory, iteration, kind, release=directory.resolve().name == RELEASE)
