"""The training loop: steps, evaluation, checkpoints, and the reasons to stop."""

import time
from dataclasses import dataclass
from typing import Any

from megatron.config.load import to_dict
from megatron.errors import ConfigError, NonFiniteError
from megatron.exits.spec import FINAL
from megatron.logs import get_logger
from megatron.train import checkpoints
from megatron.train.batch_size import training_samples
from megatron.train.console import Console, Stopwatch
from megatron.train.data import Datasets, make_datasets, microbatches, step_batches
from megatron.train.evaluate import HeadMetrics, evaluate, metric_names
from megatron.train.metrics import Sink, open_sinks
from megatron.train.signals import StopSignal
from megatron.train.step import StepReport, train_step
from megatron.train.trainer import Trainer

log = get_logger(__name__)


@dataclass
class Session:
    """One start of a run: the trainer plus what it talks to. `last_saved`: iteration of the newest checkpoint."""

    trainer: Trainer
    datasets: Datasets
    console: Console
    sinks: list[Sink]
    started: float
    last_saved: int
    nonfinite_in_a_row: int = 0

    def report(self, record: dict[str, Any]) -> None:
        """Send a record to all sinks."""
        for sink in self.sinks:
            sink.write(self.trainer.progress.iteration, record)


def train(trainer: Trainer) -> str:
    """Run until the end of training or a reason to stop; returns that reason in words.

    The trainer must have its values (`checkpoints.start`). Raises NonFiniteError after too many bad steps in a row.
    """
    session = _open(trainer)
    try:
        with StopSignal() as stop:
            reason = _evaluate_only(session) if trainer.config.training.skip_train else _steps(session, stop)
        if reason == "finished":
            _final_evaluation(session)
        return reason
    finally:
        session.console.close()
        for sink in session.sinks:
            sink.close()


def _open(trainer: Trainer) -> Session:
    datasets = make_datasets(trainer)
    if datasets.train is None and not trainer.config.training.skip_train:
        raise ConfigError("there is no training data: see --split, --data-path and --train-data-path")
    return Session(
        trainer=trainer,
        datasets=datasets,
        console=Console(trainer, _last_iteration(trainer)),
        sinks=open_sinks(trainer.config, to_dict(trainer.config)) if trainer.mesh.is_main else [],
        started=time.monotonic(),
        last_saved=trainer.progress.iteration,
    )


def _last_iteration(trainer: Trainer) -> int:
    """The run's length in iterations; estimated at the full batch size for sample-based training."""
    training = trainer.config.training
    if training.train_iters is not None:
        return training.train_iters
    batch = training.global_batch_size or training.micro_batch_size * trainer.mesh.size("dp")
    left = training_samples(training, trainer.mesh.size("dp")) - trainer.progress.consumed_samples
    return trainer.progress.iteration + max(0, -(-left // batch))


def _finished(trainer: Trainer) -> bool:
    training = trainer.config.training
    if training.train_samples is not None:
        return trainer.progress.consumed_samples >= training.train_samples
    return trainer.progress.iteration >= (training.train_iters or 0)


def _steps(session: Session, stop: StopSignal) -> str:
    trainer = session.trainer
    stream = microbatches(trainer, session.datasets.train, trainer.progress.consumed_samples)
    watch = Stopwatch()
    while not _finished(trainer):
        batches = step_batches(trainer, stream)
        samples = sum(len(batch.tokens) for batch in batches) * trainer.mesh.size("dp")
        report = train_step(trainer, batches)
        seconds = watch.lap()
        session.console.step(report, samples, seconds)
        session.report(_record(trainer, report, samples, seconds))
        _guard(session, report)
        reason = _after_step(session, stop)
        watch.lap()  # evaluation and saving are not step time
        if reason:
            return reason
    _save_if_new(session)
    return "finished"


def _after_step(session: Session, stop: StopSignal) -> str | None:
    """Evaluate and save where it is time; the reason to stop, if there is one."""
    trainer = session.trainer
    training, iteration = trainer.config.training, trainer.progress.iteration
    if session.datasets.valid is not None and training.eval_iters > 0 and iteration % training.eval_interval == 0:
        _evaluate(session, "valid", session.datasets.valid, trainer.progress.consumed_valid_samples)
    interval = trainer.config.checkpoint.save_interval
    if interval and iteration % interval == 0:
        _save_if_new(session)
    reason = _reason_to_stop(session, stop)
    if reason:
        _save_if_new(session)
        session.console.say(f"stopping after iteration {iteration}: {reason}")
    return reason


def _reason_to_stop(session: Session, stop: StopSignal) -> str | None:
    training, iteration = session.trainer.config.training, session.trainer.progress.iteration
    if stop.received:
        return f"{stop.received} received"
    minutes = (time.monotonic() - session.started) / 60
    if training.exit_duration_in_mins is not None and minutes > training.exit_duration_in_mins:
        return f"--exit-duration-in-mins {training.exit_duration_in_mins:g} is over"
    if training.exit_interval and iteration % training.exit_interval == 0 and not _finished(session.trainer):
        return f"--exit-interval {training.exit_interval}"
    return None


def _save_if_new(session: Session) -> None:
    """Save under --save, unless this iteration already is."""
    trainer = session.trainer
    if trainer.config.checkpoint.save and session.last_saved != trainer.progress.iteration:
        checkpoints.save(trainer)
        session.last_saved = trainer.progress.iteration


def _guard(session: Session, report: StepReport) -> None:
    """Stop after too many non-finite steps in a row; a dynamic loss scale still on its way down doesn't count."""
    scaler = session.trainer.scaler
    if report.problem is None:
        session.nonfinite_in_a_row = 0
        return
    if scaler.dynamic and scaler.scale > scaler.min_scale:
        return
    session.nonfinite_in_a_row += 1
    limit = session.trainer.config.training.max_nonfinite_steps
    if session.nonfinite_in_a_row >= limit:
        saved = session.trainer.config.checkpoint.save
        where = (
            f"the last good checkpoint is iteration {session.last_saved} in {saved}" if saved else "no --save was given"
        )
        raise NonFiniteError(
            f"{limit} steps in a row were not finite (last: {report.problem}); {where}. "
            "Lower --lr, raise --lr-warmup-iters, or train in bf16/fp32"
        )


def _evaluate_only(session: Session) -> str:
    if session.datasets.valid is None and session.datasets.test is None:
        raise ConfigError("--skip-train evaluates, but --split leaves no validation or test data")
    if session.datasets.valid is not None:
        _evaluate(session, "valid", session.datasets.valid, session.trainer.progress.consumed_valid_samples)
    _final_test(session)
    return "evaluated"


def _final_evaluation(session: Session) -> None:
    """At the end of training: validation (unless the last step had one), then the test data."""
    training, iteration = session.trainer.config.training, session.trainer.progress.iteration
    if session.datasets.valid is not None and training.eval_iters > 0 and iteration % training.eval_interval:
        _evaluate(session, "valid", session.datasets.valid, session.trainer.progress.consumed_valid_samples)
    _final_test(session)


def _final_test(session: Session) -> None:
    if session.datasets.test is not None and session.trainer.config.training.eval_iters > 0:
        _evaluate(session, "test", session.datasets.test, 0)


def _evaluate(session: Session, split: str, dataset: Any, start: int) -> dict[str, HeadMetrics]:
    """Score every head over --eval-iters global batches of `split` from sample `start` on, and report."""
    trainer = session.trainer
    training, dp_size = trainer.config.training, trainer.mesh.size("dp")
    batch = training.global_batch_size or training.micro_batch_size * dp_size
    per_microbatch = training.micro_batch_size * dp_size
    count = training.eval_iters * batch // per_microbatch
    if start + count * per_microbatch > len(dataset):
        start = 0  # the split is used up: begin again
    watch = Stopwatch()
    results = evaluate(trainer.stage, limited(microbatches(trainer, dataset, start), count))
    session.console.evaluation(f"{split} evaluation", results, watch.lap())
    names = metric_names(results)
    prefix = "eval" if split == "valid" else split
    session.report({f"{prefix}/{name}": value for name, value in names.items()} | {"run": trainer.progress.run})
    if split == "valid":
        trainer.progress.consumed_valid_samples = start + count * per_microbatch
    return results


def limited(stream: Any, count: int) -> Any:
    """The first `count` items of a stream."""
    for _, item in zip(range(count), stream, strict=False):
        yield item


def _record(trainer: Trainer, report: StepReport, samples: int, seconds: float) -> dict[str, Any]:
    """One line of the metrics file."""
    progress, seq_length = trainer.progress, trainer.config.model.seq_length
    record: dict[str, Any] = {
        "run": progress.run,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_samples * seq_length,
        "lr": report.lr,
    }
    for label, value in report.losses.items():
        record[f"loss/{FINAL if label == FINAL else f'exit_{label}'}"] = value
    record |= {f"weight/exit_{label}": weight for label, weight in report.weights.items()}
    record |= {f"confidence/exit_{label}": value for label, value in report.confidences.items()}
    record |= {
        "grad_norm": report.grad_norm,
        "loss_scale": report.loss_scale,
        "step_time_s": seconds,
        "tokens_per_s": samples * seq_length / seconds,
        "peak_memory_bytes": trainer.mesh.backend.peak_memory_bytes(),
    }
    if trainer.config.logging.log_params_norm:
        record["params_norm"] = trainer.optimizer.parameter_norm()
    if trainer.config.logging.log_num_zeros_in_grad:
        record["num_zeros_in_grad"] = trainer.optimizer.num_zero_grads()
    if not report.applied:
        record["skipped"] = True
    return record
