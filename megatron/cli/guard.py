"""How every command ends: errors meant for the user are one message on standard error, and an exit code."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from megatron.errors import EELLMError


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: what has been begun is cleaned up like after Ctrl-C."""


def run_guarded(body: Callable[[], None], interrupted: str = "interrupted", rank: int = 0) -> int:
    """Run a command's body; returns the process's exit code. `interrupted` is said after Ctrl-C or SIGTERM.

    rank: of several processes, which this is. Errors marked as `everywhere` are said by the first one alone.
    """
    in_charge = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_charge else None
    if hasattr(sys.stdout, "reconfigure"):  # text that the terminal's encoding lacks is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        body()
        sys.stdout.flush()
    except EELLMError as error:
        if rank == 0 or not error.everywhere:
            sys.stderr.write(f"error: {f'[rank {rank}] ' if rank else ''}{error}\n")
        return error.exit_code
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{interrupted}\n")
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except BrokenPipeError:  # the reader has seen enough; nothing may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated
