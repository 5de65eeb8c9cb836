"""SIGTERM and SIGINT ask a run to stop at the next step border; a second one stops it at once."""

import signal
from types import FrameType

from megatron.parallel.mesh import Mesh

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Context manager that turns the first signal into a flag and restores the handlers on leaving."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def agreed(self, mesh: Mesh, *also: bool) -> tuple[str | None, list[int]]:
        """The signal that any rank has received by now, and which of `also` hold for any rank.

        The same on all of them, which all must call this.
        """
        number, *held = mesh.largest(signal.Signals[self.received] if self.received else 0, *also)
        return (signal.Signals(number).name if number else None), held

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt(f"second signal ({signal.Signals(number).name})")
        self.received = signal.Signals(number).name
