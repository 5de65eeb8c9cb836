"""`run_status.json` beside the checkpoints: whether the run goes on, and why it ended, for scripts that restart it.

A run that was killed leaves "running" behind.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.errors import EELLMError
from megatron.files import atomic_write
from megatron.logs import get_logger
from megatron.train.trainer import Trainer

STATUS = "run_status.json"
log = get_logger(__name__)


class Status:
    """What is said at the end; `reason` is set by whoever knows it."""

    def __init__(self, trainer: Trainer) -> None:
        save = trainer.config.checkpoint.save
        training = not trainer.config.training.skip_train and trainer.mesh.is_main
        self._path = Path(save) / STATUS if save and training else None
        self._trainer = trainer
        self.reason = ""

    def started(self) -> None:
        """The first step is about to come."""
        self.write("running", None)

    def write(self, state: str, exit_code: int | None) -> None:
        """Replace the file. A disk that refuses is no reason to end: it is said."""
        if self._path is None or (state == "ended" and not self._path.parent.is_dir()):
            return  # what fails before the first step leaves no files
        progress = self._trainer.progress
        content: dict[str, Any] = {
            "state": state,
            "reason": self.reason,
            "exit_code": exit_code,
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "run": progress.run,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(str(self._path)) as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)


@contextmanager
def reported(trainer: Trainer) -> Iterator[Status]:
    """Say in `run_status.json` how the block ended; the exit code is that of the process."""
    status = Status(trainer)
    try:
        yield status
    except EELLMError as error:
        status.reason = str(error)
        status.write("ended", error.exit_code)
        raise
    except BaseException as error:
        status.reason = f"{type(error).__name__}: {error}".rstrip(": ")
        status.write("ended", 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    status.write("ended", 0)
