"""What the two converters of the command line share: a bar on standard error, and a line about what was written."""

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from megatron.checkpoint.convert.convert import Conversion, convert
from megatron.checkpoint.find import recognise
from megatron.logs import setup_logging

_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 1 << 20  # of glibc's mallopt; bytes


def return_large_blocks() -> None:
    """Have glibc give each large block back to the system once it is free; nothing with another C library.

    By itself it keeps some for each tensor that comes and goes, and memory would grow with the model.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def run(job: Conversion) -> None:
    """Convert, and say on standard output what came of it."""
    setup_logging()
    return_large_blocks()
    bars: list[tqdm] = []

    def begin(total: int) -> Callable[[int], None]:
        bars.append(tqdm(total=total, unit="B", unit_scale=True, desc="converting", dynamic_ncols=True, disable=None))
        return bars[0].update

    try:
        report = convert(job, begin)
    finally:
        for bar in bars:
            bar.close()
    state = "the optimizer's state, " if report.with_optimizer else ""
    checked = "read back and equal" if job.verify else "not read back"
    sys.stdout.write(
        f"wrote {report.directory} ({job.source} to {job.target}): {report.tensors} tensors of the model, {state}"
        f"{report.nbytes / 1e6:,.1f} MB, {checked}\n"
    )


def format_in(root: Path, iteration: int | None) -> str:
    """The format of the checkpoint in a directory, by content. Raises CheckpointError where there is none."""
    if (root / "config.json").is_file() and not any(root.glob("iter_*")):
        return "hf"
    return recognise(root, iteration).format
