"""Files that appear whole or not at all: temporary name beside the target, fsync, then rename.

Callers meet `OSError` only; a failed write leaves the old file as it was and no temporary one behind.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from megatron import faults


def temporary_name(path: str) -> str:
    """A name beside `path` that no other process uses."""
    return f"{path}.{uuid.uuid4().hex}.tmp"


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
