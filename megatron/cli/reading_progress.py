"""What a tool says on standard error while it reads a corpus: how far, how fast, what it passed over, why it failed.

A bar with MB/s and time left on a terminal; elsewhere a line every so many documents.
"""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from megatron.data.text_files import BadRecord

BAD_SHOWN = 5


class ReadingProgress:
    """Use in a `with` block and call `update` after each batch."""

    def __init__(self, total_bytes: int, log_interval: int = 1000, verb: str = "Processed") -> None:
        """`total_bytes`: what all updates add up to, 0 if unknown; `log_interval`: documents between reports."""
        self.documents = 0
        self.consumed = 0
        self.num_bad = 0
        self._log_interval = log_interval
        self._next_report = log_interval
        self._verb = verb
        self._started = time.monotonic()
        self._bar = tqdm(
            total=total_bytes or None,
            unit="B",
            unit_scale=True,
            desc=verb,
            dynamic_ncols=True,
            disable=None,  # off where standard error is no terminal
        )

    def __enter__(self) -> "ReadingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self.num_bad > BAD_SHOWN:
            self._say(f"... and {self.num_bad - BAD_SHOWN:,} more unreadable records")

    def update(self, documents: int, consumed: int, bad: Sequence[BadRecord]) -> None:
        """Count `documents` and `consumed` bytes of input; show the first few unreadable records."""
        for record in bad[: max(0, BAD_SHOWN - self.num_bad)]:
            self._say(f"skipped {record}")
        self.num_bad += len(bad)
        self.documents += documents
        self.consumed += consumed
        self._bar.update(consumed)
        if self.documents >= self._next_report:
            self._next_report = (self.documents // self._log_interval + 1) * self._log_interval
            self._report()

    def megabytes_per_second(self) -> float:
        """Input read per second so far."""
        return self.consumed / 1e6 / max(time.monotonic() - self._started, 1e-9)

    def _report(self) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self.documents:,} documents", refresh=False)
            return
        rate = self.documents / max(time.monotonic() - self._started, 1e-9)
        left = ""
        if self._bar.total and self.consumed:
            seconds = (self._bar.total - self.consumed) / 1e6 / max(self.megabytes_per_second(), 1e-9)
            left = f", {tqdm.format_interval(max(0, seconds))} left"
        speed = f"{rate:,.0f} documents/s, {self.megabytes_per_second():.2f} MB/s"
        self._say(f"{self._verb} {self.documents:,} documents ({speed}{left})")

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
