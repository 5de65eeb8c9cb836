"""How torch.distributed.checkpoint writes and reads its files here: in a few at a time, hashed on the way."""

import errno
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _ReaderView
from torch.futures import Future

from megatron import faults
from megatron.checkpoint.commit import flush
from megatron.checkpoint.manifest import Description
from megatron.checkpoint.safe import brief, check_tensor, read_into, tensor_in
from megatron.errors import CheckpointError

MOST_FILES, AT_A_TIME = 8, 4  # more files than threads: some reach the disk while others are still hashed
_FULL_FILE = 16 << 20  # bytes: a smaller checkpoint is one file


class Writer(dcp.FileSystemWriter):
    """Cuts a rank's tensors into a few files of like size, writes some at a time, and flushes each when it is done.

    Leaves out the identity of the save and its path: the same state gives the same index. `described` receives what
    was written, file by file. Once `given_up` is set the next file operation fails.
    """

    def __init__(self, path: Path, described: dict[Path, Description], given_up: Event) -> None:
        super().__init__(path, overwrite=False, sync_files=False)
        self.fs = _HashingFileSystem(described, given_up)

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Torch's own threads (`thread_count`) would lose the error of a thread, and with it the tensors."""
        parts = _cut(plan.items)
        prefix = plan.storage_data.prefix

        def write(number: int) -> list[WriteResult]:
            own = replace(plan.storage_data, prefix=f"{prefix}{number}")
            return super(Writer, self).write_data(replace(plan, items=parts[number], storage_data=own), planner).wait()

        with ThreadPoolExecutor(max_workers=AT_A_TIME) as pool:
            try:
                results = [result for part in pool.map(write, range(len(parts))) for result in part]
            except BaseException:  # a second signal, or a full disk: nobody wants the rest
                self.fs.failed.set()
                raise
        return _done(results)


class Reader(dcp.FileSystemReader):
    """Takes the index as already read by the restricted reader; torch's own would unpickle it. Reads files at the same
    time."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)

        def read(file: str) -> None:
            try:
                super(Reader, self).read_data(replace(plan, items=by_file[file]), planner).wait()
            except Exception as error:  # torch's own, of many kinds
                said = str(error) if isinstance(error, CheckpointError) else brief(error)
                raise CheckpointError(f"{file}: {said}") from error

        with ThreadPoolExecutor(max_workers=AT_A_TIME) as pool:
            list(pool.map(read, by_file))
        return _done(None)

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        """A tensor's part of a file, once it is known to hold just that: torch's reader would expand bombs."""
        check_tensor(_Part(file, sinfo.offset, sinfo.length))
        return super()._slice_file(file, sinfo)


class _Part(_ReaderView):
    """A part of a file, as a file; torch's own takes offsets from its end with the wrong sign."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return super().seek(offset + self.len * (whence == os.SEEK_END)) - self.offset


def read_tensor(directory: Path, metadata: Metadata, name: str, whole: Tensor) -> None:
    """Fill a contiguous tensor with all boxes of `name`, read straight to their places: nothing else takes memory.

    Raises:
        CheckpointError: a file is missing or damaged, or a box is of another shape or type than the index says.
    """
    for number, box in enumerate(metadata.state_dict_metadata[name].chunks):
        place = metadata.storage_data[MetadataIndex(name, box.offsets, number)]
        target = whole
        for dim, (start, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            target = target.narrow(dim, start, length)
        straight = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        try:
            with (directory / place.relative_path).open("rb") as file:
                part = _Part(file, place.offset, place.length)
                found = tensor_in(part)
                if (found.shape, found.dtype) != (target.shape, target.dtype):
                    raise CheckpointError(f"{name} is not of the shape and type that the index says")
                read_into(straight, part, found)
        except OSError as error:
            raise CheckpointError(f"cannot read {directory / place.relative_path}: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{directory / place.relative_path}: {error}") from error
        if straight is not target:
            target.copy_(straight)


class _HashingFileSystem(FileSystem):
    """Torch's, with a fault point before each operation, and a hash of each file it writes.

    Once `failed` or `given_up` is set the next write of every stream fails.
    """

    def __init__(self, described: dict[Path, Description], given_up: Event) -> None:
        super().__init__()
        self._described = described
        self._given_up, self.failed = given_up, Event()

    def _check(self) -> None:
        go_on_unless(self._given_up)
        go_on_unless(self.failed)

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        faults.point("tensors.open")
        with super().create_stream(path, mode) as stream:
            hashed = Hashed(faults.watched(stream, "tensors.write"), self._check)
            try:
                yield hashed
            except Exception:
                if hashed.failure:  # torch's zip writer reports it as an error of its own
                    raise hashed.failure from None
                raise
        self._check()
        flush(path)
        self._described[path] = hashed.description()

    def mkdir(self, path: Path) -> None:
        faults.point("tensors.mkdir")
        super().mkdir(path)

    def rename(self, path: Path, new_path: Path) -> None:
        faults.point("tensors.rename")
        super().rename(path, new_path)
        self._described[new_path] = self._described.pop(path)


class Hashed:
    """A stream that is only ever appended to, and the hash of what went into it."""

    def __init__(self, stream: Any, check: Callable[[], None]) -> None:
        self._stream, self._check, self._digest, self._size = stream, check, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            self._check()
            self._digest.update(content)
            self._size += len(content)
            return self._stream.write(content)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def description(self) -> Description:
        return {"sha256": self._digest.hexdigest(), "size": self._size}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def go_on_unless(given_up: Event) -> None:
    """Raise the OSError that ends a save which nobody wants any more."""
    if given_up.is_set():
        raise OSError(errno.ECANCELED, "the save was given up")


def _cut(items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items in parts of like size: the largest first, each to the part that has least."""
    sizes = {
        id(item): item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize for item in items
    }
    count = max(1, min(MOST_FILES, sum(sizes.values()) // _FULL_FILE, len(items)))
    parts: list[list[WriteItem]] = [[] for _ in range(count)]
    totals = [0] * count
    for item in sorted(items, key=lambda item: -sizes[id(item)]):
        smallest = totals.index(min(totals))
        parts[smallest].append(item)
        totals[smallest] += sizes[id(item)]
    return parts


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
