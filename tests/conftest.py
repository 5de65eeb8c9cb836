"""Shared set-up: one thread per test process, and each test finds the package's logger as a library user does."""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def library_logging() -> Iterator[None]:
    """Undo what a command run inside the test process does to logging, so that no test depends on its order."""
    logger = logging.getLogger("megatron")
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
