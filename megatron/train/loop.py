"""The training loop: steps, evaluation, checkpoints, and the reasons to stop."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from megatron.checkpoint.find import checkpoints_in, foreign, iteration_name, iterations
from megatron.config.load import to_dict
from megatron.config.run import CheckpointConfig, RunConfig
from megatron.data.build import Dataset
from megatron.data.loader import Microbatch
from megatron.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from megatron.logs import get_logger
from megatron.train.batch_size import global_batch_size, global_batch_sizes, is_finished, training_length
from megatron.train.console import Console, Stopwatch
from megatron.train.data import Datasets, make_datasets, microbatches, step_batches
from megatron.train.evaluate import evaluate, metric_names
from megatron.train.metrics import Reporter, next_run, open_reporter, step_record
from megatron.train.plan import filling_in_words
from megatron.train.saving import Saver
from megatron.train.signals import StopSignal
from megatron.train.step import StepReport, train_step
from megatron.train.tracing import Tracer
from megatron.train.trainer import Trainer

log = get_logger(__name__)
T = TypeVar("T")


@dataclass
class Session:
    """One start of a run: the trainer plus what it talks to.

    loaded: iteration that it began at; bad_steps: skipped steps in a row.
    """

    trainer: Trainer
    datasets: Datasets
    console: Console
    reporter: Reporter
    stop: StopSignal
    started: float
    saver: Saver
    loaded: int
    bad_steps: int = 0


def train(trainer: Trainer, stop: StopSignal | None = None, started: Callable[[], None] = lambda: None) -> str:
    """Run until the end of training or a reason to stop; returns that reason in words.

    `stop`, opened by the caller, is asked at each step's border; without it nobody heeds signals. `started` is called
    once data and places for results are known to be good, before the first step.

    The trainer must have its values (`checkpoints.start`). Raises NonFiniteError after too many bad steps in a row.
    """
    session = _open(trainer, stop or StopSignal())
    started()
    try:
        if trainer.config.training.skip_train:
            return _evaluate_only(session)
        _say_if_done(session)
        reason = _steps(session)
        if reason == "finished":
            _final_evaluation(session)
        return reason
    except DataError:
        _save_what_there_is(session)
        raise
    except KeyboardInterrupt:
        session.saver.give_up()
        raise
    finally:
        session.saver.close()
        session.console.close()
        session.reporter.close()


def _save_what_there_is(session: Session) -> None:
    """The data broke: the state is that of the last whole step. A disk that refuses hides no other error."""
    try:
        session.saver.finish(session.bad_steps)
    except StorageError as error:
        log.error("%s", error)


def _open(trainer: Trainer, stop: StopSignal) -> Session:
    config, iteration = trainer.config, trainer.progress.iteration
    datasets = make_datasets(trainer)
    if datasets.train is None and not config.training.skip_train:
        raise ConfigError("there is no training data: see --split, --data-path and --train-data-path")
    if config.checkpoint.save and not config.training.skip_train:
        trainer.peers.lead(lambda: _check_save(config.checkpoint, iteration))
    if config.parallel.fill_explicit_bubbles and not config.training.skip_train:
        largest = global_batch_sizes(config.training, trainer.mesh.size("dp"))[-1]
        plan = trainer.plan(largest // (config.training.micro_batch_size * trainer.mesh.size("dp")))
        log.info("%s", filling_in_words(config.parallel, plan))
    trainer.progress.run = max(trainer.progress.run, next_run(config.logging.metrics_file))
    console = Console(trainer, _last_iteration(trainer))
    return Session(
        trainer=trainer,
        datasets=datasets,
        console=console,
        reporter=open_reporter(config, to_dict(config)) if trainer.mesh.is_main else Reporter([]),
        stop=stop,
        started=time.monotonic(),
        saver=Saver(trainer, console.say),
        loaded=iteration,
    )


def _check_save(flags: CheckpointConfig, iteration: int) -> None:
    """Find out before the first step, not at the first save, what is wrong with --save."""
    directory = Path(flags.save)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise StorageError(f"--save {directory}: {error.strerror}; give a directory that can be written to") from error
    _say_replaced(flags, iteration)


def _say_replaced(flags: CheckpointConfig, iteration: int) -> None:
    """Name what an earlier run left ahead of this one: its checkpoints will be replaced one by one.

    Raises CheckpointError where something else is in the way, which a save never replaces.
    """
    directory = Path(flags.save)
    for number, kind in foreign(directory).items():
        if number > iteration:
            what = f"iteration {number} in Megatron's format, which is" if kind else (
                f"{iteration_name(number)}, which is no checkpoint and"
            )  # fmt: skip
            raise CheckpointError(f"--save {directory} holds {what} never replaced: give another --save directory")
    if ahead := [number for number in iterations(directory) if number > iteration]:
        log.warning("--save %s holds iterations %d to %d of an earlier run: this one starts at %d and replaces those "
                    "that it reaches", directory, min(ahead), max(ahead), iteration)  # fmt: skip
        if flags.load_iteration:
            log.warning("a restart without --load-iteration takes iteration %d: give a new --save directory to keep "
                        "this run apart", max(ahead))  # fmt: skip


def _last_iteration(trainer: Trainer) -> int:
    """The iteration that the run ends with."""
    training, dp_size = trainer.config.training, trainer.mesh.size("dp")
    return max(training_length(training, dp_size)[0], trainer.progress.iteration)


def _say_if_done(session: Session) -> None:
    trainer = session.trainer
    progress = trainer.progress
    if is_finished(trainer.config.training, progress.iteration, progress.consumed_samples, trainer.mesh.size("dp")):
        log.warning("nothing left to train: the checkpoint is at iteration %d, the end of --train-iters (or "
                    "--train-samples). To go on, raise it and add --override-opt_param-scheduler",
                    progress.iteration)  # fmt: skip


def _steps(session: Session) -> str:
    trainer = session.trainer
    progress, dp_size = trainer.progress, trainer.mesh.size("dp")
    stream = microbatches(trainer, session.datasets.train, progress.consumed_samples)
    watch = Stopwatch()
    tracer = Tracer(trainer)
    batches = _read_step(session, stream)
    _raise_together(session, batches, *trainer.mesh.largest(isinstance(batches, DataError)))
    while batches:
        recorder = tracer.begin()
        report = train_step(trainer, batches, recorder)
        tracer.end(recorder, len(batches))
        samples, seconds = sum(len(batch.tokens) for batch in batches) * dp_size, watch.lap()
        session.console.step(report, samples, seconds)
        session.reporter.write(progress.iteration, step_record(trainer, report, samples, seconds))
        _guard(session, report)
        _save_and_evaluate(session)
        watch.lap()  # evaluation and saving are not step time
        batches = _read_step(session, stream)
        if reason := _reason_to_stop(session, batches):
            session.saver.finish(session.bad_steps)
            session.console.say(f"stopping after iteration {progress.iteration}: {reason}")
            return reason
    session.saver.finish(session.bad_steps)
    return "finished"


def _read_step(session: Session, stream: Iterator[Microbatch]) -> list[Microbatch] | DataError:
    """The microbatches of the next step, none after the last one; or why they can't be read."""
    training, progress = session.trainer.config.training, session.trainer.progress
    if is_finished(training, progress.iteration, progress.consumed_samples, session.trainer.mesh.size("dp")):
        return []
    return _attempt(lambda: step_batches(session.trainer, stream))


def _attempt(read: Callable[[], T]) -> T | DataError:
    """What `read` returned; or its error, which the other ranks have to hear of before this one ends."""
    try:
        return read()
    except DataError as error:
        return error


def _raise_together(session: Session, read: object, anywhere: int) -> None:
    """Raise the DataError that some rank has `read`, if any: the same one on all of them."""
    if not anywhere:
        return
    mesh, peers = session.trainer.mesh, session.trainer.peers
    if mesh.world_size == 1:
        raise read
    told = peers.gather(str(read) if isinstance(read, DataError) else None)
    rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
    error = DataError(f"rank {rank} ({mesh.place(rank)}): {text}")
    error.everywhere = True
    raise error


def _save_and_evaluate(session: Session) -> None:
    """What is due after a step."""
    interval, iteration = session.trainer.config.training.eval_interval, session.trainer.progress.iteration
    session.saver.after_step(session.bad_steps)
    if iteration % interval == 0:
        _evaluate(session, "valid", session.datasets.valid, iteration // interval - 1)


def _reason_to_stop(session: Session, upcoming: list[Microbatch] | DataError) -> str | None:
    """The first reason that any rank has; the same on all of them, agreed in one message.

    `upcoming`: what the next step is to read. Raises its DataError where there is no other reason.
    """
    training, progress, mesh = session.trainer.config.training, session.trainer.progress, session.trainer.mesh
    minutes, limit = (time.monotonic() - session.started) / 60, training.exit_duration_in_mins
    late = limit is not None and minutes > limit
    received, (late, broken) = session.stop.agreed(mesh, late, isinstance(upcoming, DataError))
    if received:
        return f"{received} received"
    if is_finished(training, progress.iteration, progress.consumed_samples, mesh.size("dp")):
        return None
    if late:
        return f"--exit-duration-in-mins {limit:g} is over"
    if training.exit_interval and progress.iteration % training.exit_interval == 0:
        return f"--exit-interval {training.exit_interval}"
    _raise_together(session, upcoming, broken)
    return None


def _guard(session: Session, report: StepReport) -> None:
    """Stop after too many skipped steps in a row; a dynamic loss scale still on its way down doesn't count."""
    trainer = session.trainer
    if report.problem is None:
        session.bad_steps = 0
        session.saver.finite_step()
        return
    if report.overflow and trainer.scaler.dynamic and report.loss_scale > trainer.scaler.min_scale:
        return
    session.bad_steps += 1
    limit = trainer.config.training.max_nonfinite_steps
    if session.bad_steps >= limit:
        raise NonFiniteError(
            f"{limit} steps in a row were skipped (last: {report.problem}); {_last_good(session)}. "
            f"{_advice(trainer.config)}"
        )


def _last_good(session: Session) -> str:
    """Where the newest checkpoint known to be good lies, in words, if it is still there."""
    flags, good = session.trainer.config.checkpoint, session.trainer.progress.good
    directory = flags.load if good <= session.loaded else flags.save
    if good and directory and any(found.iteration == good for found in checkpoints_in(Path(directory))):
        return (
            f"the last checkpoint known to be good is --load {directory} --load-iteration {good}. Go on from it with a "
            "new --save directory: in this one a restart would take the newest"
        )
    return "there is no checkpoint from before"


def _advice(config: RunConfig) -> str:
    """What may keep steps from being skipped."""
    mends = ["Lower --lr", "raise --lr-warmup-iters"]
    if config.training.check_for_spiky_loss or config.training.check_for_large_grads:
        mends.append("raise --spike-factor")
    if config.precision.fp16:
        mends.append("train in bf16 or fp32")
    return f"{', '.join(mends[:-1])}, or {mends[-1]}"


def _evaluate_only(session: Session) -> str:
    if session.datasets.valid is None and session.datasets.test is None:
        raise ConfigError("--skip-train evaluates, but --split leaves no validation or test data")
    _evaluate(session, "valid", session.datasets.valid, 0)
    _evaluate(session, "test", session.datasets.test, 0)
    received, _ = session.stop.agreed(session.trainer.mesh)
    return f"{received} received" if received else "evaluated"


def _final_evaluation(session: Session) -> None:
    """At the end of training: validation (unless the last step had one), then the test data."""
    interval, iteration = session.trainer.config.training.eval_interval, session.trainer.progress.iteration
    if iteration % interval:
        _evaluate(session, "valid", session.datasets.valid, iteration // interval)
    _evaluate(session, "test", session.datasets.test, 0)


def _evaluate(session: Session, split: str, dataset: Dataset | None, turn: int) -> None:
    """Score every head over --eval-iters global batches of `split`, and report; a signal cuts it short.

    `turn` counts the evaluations before this one: each takes the samples that follow the last one's, so that which
    they are depends on the iteration alone. Where the split is used up it begins again.
    """
    trainer, training = session.trainer, session.trainer.config.training
    if dataset is None or training.eval_iters == 0:
        return
    dp_size = trainer.mesh.size("dp")
    per_microbatch = training.micro_batch_size * dp_size
    count = max(1, training.eval_iters * global_batch_size(training, 1 << 62, dp_size) // per_microbatch)
    turns = max(1, len(dataset) // (count * per_microbatch))
    watch = Stopwatch()
    stream = microbatches(trainer, dataset, turn % turns * count * per_microbatch)
    results = evaluate(trainer, _until_stopped(islice(stream, count), session))
    received, _ = session.stop.agreed(trainer.mesh)
    if received:
        session.console.say(f"{split} evaluation given up: {received} received")
        return
    session.console.evaluation(f"{split} evaluation", results, watch.lap())
    prefix = "eval" if split == "valid" else split
    record = {f"{prefix}/{name}": value for name, value in metric_names(results).items()}
    session.reporter.write(trainer.progress.iteration, record | {"run": trainer.progress.run})


def _until_stopped(batches: Iterator[Microbatch], session: Session) -> Iterator[Microbatch]:
    """The batches until a rank receives a signal. Raises a DataError on all ranks where one meets it."""
    while True:
        batch = _attempt(lambda: next(batches, None))
        received, (broken,) = session.stop.agreed(session.trainer.mesh, isinstance(batch, DataError))
        if received or batch is None:
            return
        _raise_together(session, batch, broken)
        yield batch
