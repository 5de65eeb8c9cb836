"""The training loop: steps, evaluation, checkpoints, and the reasons to stop."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron.checkpoint.find import checkpoints_in, foreign, iteration_name, iterations
from megatron.config.load import to_dict
from megatron.config.run import CheckpointConfig, RunConfig
from megatron.data.build import Dataset
from megatron.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from megatron.logs import get_logger
from megatron.model.stage import TokenBatch
from megatron.train.batch_size import global_batch_size, is_finished, training_length
from megatron.train.console import Console, Stopwatch
from megatron.train.data import Datasets, make_datasets, microbatches, step_batches
from megatron.train.evaluate import evaluate, metric_names
from megatron.train.metrics import Reporter, next_run, open_reporter, step_record
from megatron.train.saving import Saver
from megatron.train.signals import StopSignal
from megatron.train.step import StepReport, train_step
from megatron.train.tracing import Tracer
from megatron.train.trainer import Trainer

log = get_logger(__name__)


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
    """The data broke: the state is that of the last whole step. A disk that refuses hides no other error.

    Not with several ranks: the others wait in a step, and not for a save.
    """
    if session.trainer.mesh.world_size > 1:
        return
    try:
        session.saver.finish(session.bad_steps)
    except StorageError as error:
        log.error("%s", error)


def _open(trainer: Trainer, stop: StopSignal) -> Session:
    config, iteration = trainer.config, trainer.progress.iteration
    datasets = make_datasets(trainer)
    if datasets.train is None and not config.training.skip_train:
        raise ConfigError("there is no training data: see --split, --data-path and --train-data-path")
    if config.checkpoint.save and not config.training.skip_train and trainer.mesh.is_main:
        _check_writable(Path(config.checkpoint.save))
        _say_replaced(config.checkpoint, iteration)
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


def _check_writable(directory: Path) -> None:
    """Find out before the first step, not at the first save."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise StorageError(f"--save {directory}: {error.strerror}; give a directory that can be written to") from error


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
    training, progress, dp_size = trainer.config.training, trainer.progress, trainer.mesh.size("dp")
    stream = microbatches(trainer, session.datasets.train, progress.consumed_samples)
    watch = Stopwatch()
    tracer = Tracer(trainer)
    while not is_finished(training, progress.iteration, progress.consumed_samples, dp_size):
        batches = step_batches(trainer, stream)
        recorder = tracer.begin()
        report = train_step(trainer, batches, recorder)
        tracer.end(recorder, len(batches))
        samples, seconds = sum(len(batch.tokens) for batch in batches) * dp_size, watch.lap()
        session.console.step(report, samples, seconds)
        session.reporter.write(progress.iteration, step_record(trainer, report, samples, seconds))
        _guard(session, report)
        reason = _after_step(session)
        watch.lap()  # evaluation and saving are not step time
        if reason:
            return reason
    session.saver.finish(session.bad_steps)
    return "finished"


def _after_step(session: Session) -> str | None:
    """Save and evaluate where it is time; the reason to stop, if there is one."""
    training, iteration = session.trainer.config.training, session.trainer.progress.iteration
    session.saver.after_step(session.bad_steps)
    if iteration % training.eval_interval == 0:
        _evaluate(session, "valid", session.datasets.valid, iteration // training.eval_interval - 1)
    reason = _reason_to_stop(session)
    if reason:
        session.saver.finish(session.bad_steps)
        session.console.say(f"stopping after iteration {iteration}: {reason}")
    return reason


def _reason_to_stop(session: Session) -> str | None:
    """The first reason that any rank has; the same on all of them."""
    trainer = session.trainer
    training, progress = trainer.config.training, trainer.progress
    received = session.stop.agreed(trainer.mesh)
    if received:
        return f"{received} received"
    if is_finished(training, progress.iteration, progress.consumed_samples, trainer.mesh.size("dp")):
        return None
    minutes, limit = (time.monotonic() - session.started) / 60, training.exit_duration_in_mins
    if limit is not None and trainer.mesh.largest(minutes > limit):
        return f"--exit-duration-in-mins {limit:g} is over"
    if training.exit_interval and progress.iteration % training.exit_interval == 0:
        return f"--exit-interval {training.exit_interval}"
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
    received = session.stop.agreed(session.trainer.mesh)
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
    if received := session.stop.agreed(trainer.mesh):
        session.console.say(f"{split} evaluation given up: {received} received")
        return
    session.console.evaluation(f"{split} evaluation", results, watch.lap())
    prefix = "eval" if split == "valid" else split
    record = {f"{prefix}/{name}": value for name, value in metric_names(results).items()}
    session.reporter.write(trainer.progress.iteration, record | {"run": trainer.progress.run})


def _until_stopped(batches: Iterable[TokenBatch], session: Session) -> Iterator[TokenBatch]:
    for batch in batches:
        if session.stop.agreed(session.trainer.mesh):
            return
        yield batch
