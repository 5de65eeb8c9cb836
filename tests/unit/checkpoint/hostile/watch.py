"""A child process does the reading and notes what else it does: processes it starts, code it runs, files it changes."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron.errors import EELLMError

SECONDS = 10

# Audit events (beginnings of their names) of what no reader has to do.
FORBIDDEN = (
    "os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "ctypes.dlopen", "socket.",
    "pickle.find_class", "code.__new__", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.chmod", "os.chown", "os.truncate", "os.utime", "os.putenv", "shutil.",
)  # fmt: skip


@dataclass
class Outcome:
    """What came of reading. `error` names an exception ("" for none) or the signal that ended the process."""

    error: str = ""
    ours: bool = False
    message: str = ""
    done: list[str] = field(default_factory=list)
    megabytes: int = 0


def suspicious(event: str, arguments: tuple) -> bool:
    """Whether an audit event is one that reading has no part in."""
    if event == "open":
        changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        return isinstance(arguments[2], int) and bool(arguments[2] & changes) and arguments[0] != os.devnull
    if event == "ctypes.dlopen" and arguments[0] is None:  # this process itself, whose allocator the converter sets
        return False
    if event == "exec":  # the code of a file is a module's, which is imported late
        name = arguments[0].co_filename
        return not (name.startswith("<frozen") or os.path.exists(name))
    return event.startswith(FORBIDDEN) or (event == "import" and arguments[0] == "this")


def status(name: str) -> int:
    """A figure of this process in kB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def watched(actions: Mapping[str, Callable[[], object]]) -> dict[str, Outcome]:
    """Do the actions in a child process, one after the other; after one that kills it, the others in a new one."""
    outcomes: dict[str, Outcome] = {}
    while left := {name: action for name, action in actions.items() if name not in outcomes}:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                report(left, writer)
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            found = [Outcome(**json.loads(line)) for line in pipe.read().splitlines()]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = Outcome(error=signal.Signals(-code).name if code < 0 else f"exit code {code}")
        outcomes |= zip(left, [*found, killed], strict=False)
    return outcomes


def report(actions: Mapping[str, Callable[[], object]], writer: int) -> None:
    """The child's part: a line of JSON an action."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    most = (status("VmSize") << 10) + (4 << 30)  # what grows without end must not take the machine along
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    done: list[str] = []
    sys.addaudithook(lambda *event: done.append(f"{event!a:.200}") if suspicious(*event) else None)
    for action in actions.values():
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before, outcome = status("VmHWM"), Outcome(done=done)
        done.clear()
        signal.alarm(SECONDS)
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - what is no error of ours is the finding
            outcome.error, outcome.ours = type(error).__name__, isinstance(error, EELLMError)
            outcome.message = str(error)
        signal.alarm(0)
        outcome.megabytes = (status("VmHWM") - before) >> 10
        os.write(writer, json.dumps(vars(outcome)).encode() + b"\n")
