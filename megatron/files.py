"""Files that appear whole or not at all: temporary name beside the target, fsync, then rename.

Callers meet `OSError` only; a failed write leaves the old file as it was and no temporary one behind.
"""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from megatron import faults


def temporary_name(path: str) -> str:
    """A name beside `path` that no other process uses."""
    return f"{path}.{uuid.uuid4().hex}.tmp"


def read_small(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of an ordinary file of at most `most` bytes.

    Foreign directories may hold pipes (opening one waits for ever), links to devices (that never end) and files with
    holes (that take no disk, but memory): those are an OSError.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than any such file")
        return file.read(most)


@contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends, and vanishes if the block raises.

    Files get ordinary permissions (umask), so that colleagues can read a shared cache.
    """
    temporary = temporary_name(path)
    try:
        faults.point("file.open")
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            faults.point("file.flush")
            os.fsync(file.fileno())
        faults.point("file.rename")
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename, error.filename2 = path, None  # the name that the caller knows
        raise
