"""The native checkpoint: torch.distributed.checkpoint for tensors, JSON for the rest, keys free of any layout.

`<root>/iter_0001200/{facts.json, tensors/, tokenizer/}` appears as a whole (commit.py); `find.py` says which to load.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron import faults
from megatron.checkpoint import commit
from megatron.checkpoint.commit import Staged
from megatron.checkpoint.dcp_files import Reader, Writer, go_on_unless, read_tensor
from megatron.checkpoint.find import (
    FACTS,
    INDEX,
    NATIVE,
    TENSORS,
    TOKENIZER,
    TRACKER,
    format_of,
    iteration_name,
    iterations,
)  # fmt: skip
from megatron.checkpoint.manifest import Description, describe
from megatron.checkpoint.planner import BoxLoadPlanner, BoxSavePlanner, placed
from megatron.checkpoint.safe import brief, read_dcp_metadata
from megatron.checkpoint.state import PADDING, Entry, RunState, check, copy_padding, without
from megatron.checkpoint.together import ALONE, Together
from megatron.checkpoint.typed import count, mapping, text
from megatron.errors import CheckpointError, StorageError
from megatron.files import read_small
from megatron.logs import get_logger
from megatron.parallel.placement import Placed, views

_log = get_logger(__name__)
VERSION = 1
_LARGEST_FACTS = 64 << 20  # bytes


class Streamed(NamedTuple):
    """How a state is saved that isn't in memory.

    read: gives each tensor by its key when it is written; several threads ask. check: is called with the directory
    before it gets its name, and may raise.
    """

    read: Callable[[str], Tensor]
    check: Callable[[Path], None]


def save(
    root: Path,
    iteration: int,
    state: RunState,
    tokenizer_files: Iterable[Path] = (),
    given_up: Event | None = None,
    together: Together = ALONE,
    streamed: Streamed | None = None,
) -> Path:
    """Write `state` as `<root>/iter_<iteration>`, copy the tokenizer's files into it, and point the tracker at it.

    An older native checkpoint of the same iteration is replaced once the new one is whole. Returns the directory.
    `together`: the ranks that write it, each its part; all must call this, and end alike. Where another thread sets
    `given_up`, it ends at the next file operation and leaves nothing.

    Raises:
        StorageError: writing failed or was given up, or a directory of this name holds something else, which a save
            never replaces; what was there before is untouched.
    """
    final, given_up = root / iteration_name(iteration), given_up or Event()
    together.lead(lambda: _make_room(root, final))
    facts = {**state.facts, "format": NATIVE, "format_version": VERSION, "iteration": iteration}
    parts = {name: placed(tensor) for name, tensor in state.tensors.items()}
    with together.staged(final) as staged:
        together.lead(lambda: _write_files(staged, facts, tokenizer_files))
        with _dcp_errors(final, writing=True):
            dcp.save(
                views(parts),
                storage_writer=Writer(staged.path / TENSORS, staged.described, given_up),
                planner=BoxSavePlanner(parts, streamed and streamed.read),
                process_group=together.group,
                no_dist=together.group is None,
            )
        go_on_unless(given_up)
        if streamed is not None:
            streamed.check(staged.path)
    together.lead(lambda: commit.replace_file(root / TRACKER, f"{iteration}\n"))
    return final


def _make_room(root: Path, final: Path) -> None:
    commit.sweep(root)  # first of all: what a killed save left may take the room that this one needs
    _check_replaceable(final)


def _write_files(staged: Staged, facts: dict[str, Any], tokenizer_files: Iterable[Path]) -> None:
    """What isn't tensors: the facts, and the tokenizer's files."""
    try:
        hashes = _copy_files(tokenizer_files, staged.path / TOKENIZER, staged.described)
        written = json.dumps(facts | {"tokenizer_sha256": hashes}, indent=1, sort_keys=True, allow_nan=False)
        faults.point("native.facts")
        (staged.path / FACTS).write_text(written + "\n", encoding="utf-8")
        staged.described[staged.path / FACTS] = describe(staged.path / FACTS)
    except OSError as error:
        raise StorageError(f"cannot write {staged.path}: {error}") from error


def _check_replaceable(final: Path) -> None:
    try:
        content = format_of(final) if final.exists() else NATIVE
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error}") from error
    if content != NATIVE:
        raise StorageError(
            f"{final} exists and is no native checkpoint ({content or 'unknown content'}): it is not replaced. Give "
            "another --save directory, or move it away"
        )


def prune(root: Path, keep: int, newest: int, protected: Container[int] = ()) -> None:
    """Remove all native checkpoints up to iteration `newest` in `root` but the last `keep` and the `protected` ones.

    What lies ahead of `newest` is damaged or another run's: it neither counts nor goes. One that can't be removed is
    said and stays.
    """
    try:
        found = iterations(root)
    except CheckpointError as error:
        _log.warning("older checkpoints stay: %s", error)
        return
    ours = sorted(number for number, it in found.items() if it.format == NATIVE and number <= newest)
    for number in ours[:-keep]:
        if number not in protected:
            try:
                commit.remove(found[number].directory)
            except StorageError as error:
                _log.warning("%s", error)


def load(
    directory: Path,
    targets: Mapping[str, Tensor | Placed],
    *,
    ignore: tuple[str, ...] = (),
    convert: bool = False,
    elsewhere: Container[str] = (),
) -> None:
    """Fill live tensors (or views of them, or parts of whole ones) in place.

    Every tensor of the checkpoint must have its target, here or (`elsewhere`) on another rank.
    `ignore` lists key prefixes of the checkpoint that are left aside, such as "optimizer/". With `convert`, model
    weights of another floating type are converted.

    Raises:
        CheckpointError: a name is missing or extra, or a shape or type differs (nothing has been loaded then), or
            a file is damaged.
    """
    metadata = _metadata(directory)
    found = without(_index(metadata), ignore)
    parts = {name: placed(tensor) for name, tensor in targets.items()}
    wanted = {name: (part.shape, part.view.dtype) for name, part in parts.items()}
    ours = {name: entry for name, entry in found.items() if name in wanted or name not in elsewhere}
    check(ours, wanted, str(directory), convert=convert)
    requests = {name: part for name, part in parts.items() if not name.endswith(PADDING)}
    padding = {
        name: Placed.whole(torch.empty(found[name][0], dtype=found[name][1]))
        for name in sorted(parts.keys() & found.keys())
        if name.endswith(PADDING)
    }
    with _dcp_errors(directory, writing=False):
        dcp.load(
            views(requests | padding),
            storage_reader=Reader(directory / TENSORS, metadata),
            planner=BoxLoadPlanner(requests | padding),
            no_dist=True,
        )
    for name, part in parts.items():
        if name.endswith(PADDING):
            rows = padding[name].view[part.offset[0] :] if name in padding else None
            copy_padding(rows, part.view)


def read_facts(directory: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, with "format", "format_version", "iteration" and "tokenizer_sha256" added.

    Raises:
        CheckpointError: the file is missing, no JSON, of a later format than this program knows, or lacks what was
            added. What else a run needs is checked in run_facts.py.
    """
    path = directory / FACTS
    try:
        facts = json.loads(read_small(path, _LARGEST_FACTS).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != NATIVE:
        raise CheckpointError(f"{path} does not describe a native checkpoint")
    version = facts.get("format_version")
    if version != VERSION:
        raise CheckpointError(f"{path} has format version {version}; this program reads {VERSION}: update it")
    count(facts, "iteration", str(path))
    hashes = mapping(facts, "tokenizer_sha256", str(path))
    for name in hashes:
        text(hashes, name, f"{path}, tokenizer_sha256")
    return facts


class Tensors:
    """The tensors of a checkpoint one by one; several threads may read.

    Raises:
        CheckpointError: the index is missing, damaged, or lists anything but tensors.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._metadata = directory, _metadata(directory)
        self.index = _index(self._metadata)

    def read(self, name: str) -> Tensor:
        """A whole tensor in new CPU memory. CheckpointError where its file is damaged."""
        whole = _empty({name: self.index[name]}, self._directory)[name]
        read_tensor(self._directory / TENSORS, self._metadata, name, whole)
        return whole


def tensor_index(directory: Path) -> dict[str, Entry]:
    """Name -> (shape, dtype) of every tensor, read without touching the tensors.

    Raises:
        CheckpointError: the index is missing, damaged, or lists anything but tensors.
    """
    return _index(_metadata(directory))


def read(directory: Path, *, ignore: tuple[str, ...] = ()) -> RunState:
    """The whole checkpoint in new CPU tensors, for converters and tools. Errors as for `load`."""
    tensors = _empty(without(tensor_index(directory), ignore), directory)
    load(directory, tensors, ignore=ignore)
    return RunState(tensors, read_facts(directory))


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """File name -> path of the tokenizer's files inside the checkpoint, verified against their recorded hashes.

    Raises:
        CheckpointError: a file is missing or is not the one that was saved.
    """
    files, inside = {}, directory / TOKENIZER
    there = {path.name: path for path in inside.iterdir()} if inside.is_dir() else {}
    for name, expected in read_facts(directory)["tokenizer_sha256"].items():
        path = there.get(name)
        if path is None or not path.is_file() or describe(path)["sha256"] != expected:
            raise CheckpointError(
                f"{inside}: {name:.200} is missing or not the file that was saved: give the tokenizer's flags"
            )
        files[name] = path
    return files


def _empty(index: Mapping[str, Entry], directory: Path) -> dict[str, Tensor]:
    try:
        return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in index.items()}
    except (RuntimeError, TypeError) as error:  # no memory; or a size beyond what a number of torch's can say
        raise CheckpointError(f"{directory}: no room for its tensors: {brief(error)}") from error


@contextmanager
def _dcp_errors(directory: Path, *, writing: bool) -> Iterator[None]:
    """Turn torch's failure report, which is no Exception, into ours; hush its notice about a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as report:
        cause = next(iter(report.failures.values()))[0]
        if not isinstance(cause, Exception):  # Ctrl-C, which torch takes for a failure of the rank
            raise cause from None
        # torch's zip writer answers a full disk with a RuntimeError
        if writing and isinstance(cause, OSError | RuntimeError):
            raise StorageError(f"cannot write {directory}: {cause}") from cause
        if writing:
            raise cause from None
        said = str(cause) if isinstance(cause, CheckpointError) else brief(cause)
        raise CheckpointError(f"{directory} is damaged: {said}") from cause


def _metadata(directory: Path) -> Metadata:
    return read_dcp_metadata(directory / INDEX)


def _index(metadata: Metadata) -> dict[str, Entry]:
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in metadata.state_dict_metadata.items()}


def _copy_files(files: Iterable[Path], target: Path, described: dict[Path, Description]) -> dict[str, str]:
    """Copy files side by side and describe them; returns name -> sha256."""
    hashes: dict[str, str] = {}
    for file in files:
        if file.name in hashes:
            raise CheckpointError(f"two tokenizer files are called {file.name}: rename one of them")
        faults.point("native.tokenizer")
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
        described[target / file.name] = describe(target / file.name)
        hashes[file.name] = described[target / file.name]["sha256"]
    return hashes
