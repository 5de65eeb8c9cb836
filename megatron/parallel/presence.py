"""Which processes of a run are still there: each has a thread that counts on in the store that they share.

A connection that breaks does not say whose end it was, and nobody who waits inside a collective can be told that
another will never come. A process that died, was stopped or left stops counting.
"""

import atexit
import json
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from torch.distributed import Store

from megatron.errors import RankLostError

_BEAT = 0.25  # seconds between two counts
_PATIENCE = 2.0  # seconds without a count after which a process is held to be gone
_PAUSE = 0.02  # seconds between two looks
_LOST = "lost"


class Presence:
    """This process among the `size` that share `store`. `timeout`: how long one waits for another that is alive."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._store = store.clone()  # a connection of its own: whoever waits on the other holds it up
        self._rank, self._size, self._timeout = rank, size, timeout
        self._meetings = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count, name="presence", daemon=True)
        self._thread.start()
        atexit.register(self.leave)  # a thread that meets the end of the interpreter may crash it

    def leave(self) -> None:
        """Stop counting; the others will find this process gone."""
        self._ended.set()
        self._thread.join(timeout=2.0)

    def missing(self) -> list[int]:
        """The ranks that do not count on any more; takes some seconds where there are any."""
        before, deadline = self._counts(range(self._size)), time.monotonic() + _PATIENCE
        silent = list(before)
        while silent and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            now = self._counts(silent)
            silent = [rank for rank in silent if now[rank] == before[rank]]
        return silent

    def lost(self) -> list[int]:
        """The ranks whose absence ends the run: those that the first to ask finds missing, for all that ask later.

        Who asks first may be gone by then, because of the others.
        """
        if not self._store.check([_LOST]):
            return json.loads(self._store.compare_set(_LOST, "", json.dumps(self.missing())))
        return json.loads(self._store.get(_LOST))

    def meet(self) -> None:
        """Wait until all ranks have come here. Every rank must call this.

        Raises RankLostError, within seconds where one is gone; a signal is not kept waiting, as it is inside torch.
        """
        self._meetings += 1
        here, deadline = f"met/{self._meetings}", time.monotonic() + self._timeout.total_seconds()
        count, look = self._store.add(here, 1), time.monotonic() + 1.0
        while count < self._size:
            if time.monotonic() > deadline:
                raise RankLostError(
                    f"rank {self._rank} waited for the others to be built for longer than "
                    "--distributed-timeout-minutes: raise it if they need more"
                )
            if time.monotonic() > look:
                if missing := self.missing():
                    raise RankLostError(
                        f"rank {self._rank} waits in vain for {ranks_in_words(missing)}, which ended before training "
                        "began; the messages there say why"
                    )
                look = time.monotonic() + 1.0
            time.sleep(_PAUSE / 10)
            count = self._store.add(here, 0)

    def _counts(self, ranks: Iterable[int]) -> dict[int, int]:
        return {rank: self._store.add(f"alive/{rank}", 0) for rank in ranks}

    def _count(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self._store.add(f"alive/{self._rank}", 1)
            except RuntimeError:  # the store has gone, and with it all who could look
                return


def ranks_in_words(ranks: list[int]) -> str:
    """ "rank 3" or "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
