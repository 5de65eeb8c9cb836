"""One way to get a logger and one place that configures output.

Library code calls `get_logger(__name__)`; only entry points call `setup_logging`.
"""

import logging
import sys

_ROOT = "megatron"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is the module's `__name__`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


class _Stdout(logging.StreamHandler):
    """Writes to whatever `sys.stdout` is at the moment of writing (tests and notebooks exchange it)."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]
        return sys.stdout


def setup_logging(level: int = logging.INFO, rank: int = 0) -> None:
    """Send the package's log records to standard output as plain lines; calling again is harmless.

    The first rank says everything, the others, with their number, what is at least a warning.
    """
    logger = logging.getLogger(_ROOT)
    logger.setLevel(logging.WARNING if rank else level)
    logger.propagate = False
    if not logger.handlers:
        handler = _Stdout()
        handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if rank else "%(message)s"))
        logger.addHandler(handler)
