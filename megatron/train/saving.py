"""When a run's checkpoints are written, on which thread, and what happens where the storage refuses."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Event

from megatron.checkpoint import native
from megatron.checkpoint.snapshot import Snapshot
from megatron.errors import StorageError
from megatron.logs import get_logger
from megatron.parallel.placement import views
from megatron.train import checkpoints
from megatron.train.trainer import Trainer

log = get_logger(__name__)

MOST_FAILED_SAVES = 3


class Saver:
    """Writes the checkpoints of one run under --save; does nothing without it.

    With --async-save a thread writes a copy of the state: the run waits for the copy alone, and for an earlier save
    that is still being written. A failed save is survived, but not three in a row.

    saved: iteration of the newest whole checkpoint, or that the run began at. The newest one whose weights are known to
    give finite losses is noted in the run's progress, and never removed.
    """

    def __init__(self, trainer: Trainer, say: Callable[[str], None]) -> None:
        flags = trainer.config.checkpoint
        self._trainer, self._say = trainer, say
        self._active = flags.save is not None and not trainer.config.training.skip_train
        self._snapshot = self._writer = None
        if self._active and flags.async_save:
            self._snapshot = Snapshot(views(checkpoints.tensors_to_save(trainer)), trainer.mesh.backend)
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: tuple[int, Future[Path]] | None = None
        self._given_up = Event()
        self._due = False
        self._failures = 0
        self._finite = 0
        self.saved = trainer.progress.iteration

    @property
    def writing(self) -> bool:
        """Whether a save is being written beside the run."""
        return self._writing is not None and not self._writing[1].done()

    def finite_step(self) -> None:
        """The step just made was finite: so are the weights that were saved before it."""
        self._finite = self._trainer.progress.iteration
        self._judge()

    def after_step(self, bad_steps: int) -> None:
        """Save every --save-interval iterations, and take note of what has been written since the last step.

        After `bad_steps` skipped steps in a row it is put off until one is finite: weights that give no finite
        loss should not become the newest checkpoint. Raises StorageError at the third failure in a row.
        """
        if self._writing and self._writing[1].done() and self._trainer.mesh.world_size == 1:
            self._settle()  # several ranks would notice at different steps
        interval = self._trainer.config.checkpoint.save_interval
        self._due |= bool(interval) and self._trainer.progress.iteration % interval == 0
        if not (self._due and self._active):
            return
        if bad_steps:
            self._say(f"saving is put off: skipped steps in a row: {bad_steps}")
            return
        self._due = False
        self._settle()
        try:
            self._begin()
        except StorageError as error:
            self._failed(error)

    def finish(self, bad_steps: int = 0) -> None:
        """Save unless this iteration is saved (a skipped step changed no weights), and wait until all is on disk.

        Even after `bad_steps` skipped steps in a row: that is said. Raises StorageError where saving fails.
        """
        self._settle()
        if bad_steps and self._active and self.saved != self._trainer.progress.iteration:
            self._say(f"the last {bad_steps} steps were skipped: the weights that are saved now gave no finite loss, "
                      "or a spike")  # fmt: skip
        self._begin()
        self._collect()

    def give_up(self) -> None:
        """Nobody waits for a save any more: one that is being written ends at its next file operation."""
        self._given_up.set()

    def close(self) -> None:
        """Wait for a save that is being written, whatever the reason to end is; its failure is said."""
        try:
            self._collect()
        except StorageError as error:
            log.error("%s", error)
        finally:
            if self._writer:
                self._writer.shutdown()

    def _begin(self) -> None:
        iteration = self._trainer.progress.iteration
        if not self._active or self.saved == iteration:
            return
        state = checkpoints.capture(self._trainer, self._snapshot)
        trainer, files = self._trainer, self._trainer.tokenizer.files()
        write = partial(checkpoints.write, trainer.config, state, files, self._given_up, trainer.together)
        if self._writer:
            self._writing = iteration, self._writer.submit(write)
        else:
            self._written(iteration, write())

    def _settle(self) -> None:
        """Wait for the save that is being written, if there is one; its failure is counted."""
        try:
            self._collect()
        except StorageError as error:
            self._failed(error)

    def _collect(self) -> None:
        if not self._writing:
            return
        iteration, result = self._writing
        if not result.done():
            doing = "giving up" if self._given_up.is_set() else "waiting for"
            self._say(f"{doing} the checkpoint that is being written")
            try:
                wait([result])
            except KeyboardInterrupt:
                self.give_up()
                raise
        self._writing = None
        self._written(iteration, result.result())

    def _written(self, iteration: int, directory: Path) -> None:
        log.info("saved %s", directory)
        self.saved = iteration
        self._judge()
        self._failures = 0
        keep = self._trainer.config.checkpoint.keep_last_n_checkpoints
        if keep and self._trainer.mesh.is_main:
            native.prune(directory.parent, keep, iteration, {self._trainer.progress.good})

    def _judge(self) -> None:
        if self.saved < self._finite:
            self._trainer.progress.good = self.saved

    def _failed(self, error: StorageError) -> None:
        self._failures += 1
        if self._failures >= MOST_FAILED_SAVES:
            raise error
        self._say(f"{error}; training goes on, and stops after {MOST_FAILED_SAVES} such failures in a row")
