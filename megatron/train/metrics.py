"""What a run reports: a stream of flat dicts, sent to every sink that the flags ask for, by one rank."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from megatron.config.run import LoggingConfig, RunConfig
from megatron.errors import ConfigError, StorageError
from megatron.exits.spec import FINAL
from megatron.logs import get_logger
from megatron.train.step import StepReport
from megatron.train.trainer import Trainer

log = get_logger(__name__)


class Sink(Protocol):
    """Takes one record per call."""

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Report `record`, which belongs to `iteration`."""

    def close(self) -> None:
        """Flush and release."""


class MetricsFile:
    """--metrics-file: one JSON object per line, appended; non-finite numbers are null."""

    def __init__(self, path: str) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
            self._drop_torn_line(path)
        except OSError as error:
            raise StorageError(f"--metrics-file {path}: {error}") from error

    def _drop_torn_line(self, path: str) -> None:
        """End a line that a crash cut short, so that the next record starts on its own."""
        if os.path.getsize(path) > 0:
            with open(path, "rb") as existing:
                existing.seek(-1, os.SEEK_END)
                if existing.read(1) != b"\n":
                    self._file.write("\n")

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        clean = {key: finite(value) for key, value in {"iteration": iteration, **record}.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """--tensorboard-dir: one scalar curve per key."""

    def __init__(self, directory: str, interval: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard-dir needs the tensorboard package: pip install 'ee-llm[log]'") from error
        try:
            self._writer, self._interval = SummaryWriter(directory), interval
        except OSError as error:
            raise StorageError(f"--tensorboard-dir {directory}: {error}") from error

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Add a point to each numeric curve."""
        if iteration % self._interval == 0 or any(key.startswith("eval/") for key in record):
            for key, value in _numbers(record).items():
                self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """--wandb-project: the same curves, with the run's config."""

    def __init__(self, flags: LoggingConfig, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb-project needs the wandb package: pip install 'ee-llm[log]'") from error
        try:
            self._run = wandb.init(
                project=flags.wandb_project,
                group=flags.wandb_group,
                name=flags.wandb_exp_name,
                dir=flags.wandb_save_dir,
                config=config,
            )
        except Exception as error:
            raise ConfigError(
                f"--wandb-project {flags.wandb_project}: {error}. Log in (wandb login), set WANDB_MODE=offline, or "
                "leave the flag out"
            ) from error
        self._interval = flags.tracker_log_interval

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Log the numeric values."""
        if iteration % self._interval == 0 or any(key.startswith("eval/") for key in record):
            self._run.log(_numbers(record), step=iteration)

    def close(self) -> None:
        """End the wandb run."""
        self._run.finish()


class Reporter:
    """Sends records to all sinks. A sink that fails (disk full, service gone) is dropped with a warning."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Report `record`, which belongs to `iteration`."""
        for sink in list(self._sinks):
            try:
                sink.write(iteration, record)
            except Exception as error:  # noqa: BLE001 - services raise errors of their own
                self._sinks.remove(sink)
                log.warning("%s: %s; training goes on without it", type(sink).__name__, error)

    def close(self) -> None:
        """Flush and release all sinks."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("%s: %s", type(sink).__name__, error)


def next_run(metrics_file: str | None) -> int:
    """Number of this start of a run, as far as its metrics file tells: one more than the last line's."""
    try:
        with open(metrics_file or os.devnull, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            lines = file.read(65536).splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["run"]) + 1
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short, or none of ours
    return 0


def step_record(trainer: Trainer, report: StepReport, samples: int, seconds: float) -> dict[str, Any]:
    """What the metrics file says of one step."""
    progress, seq_length, flags = trainer.progress, trainer.config.model.seq_length, trainer.config.logging
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
    if flags.log_params_norm:
        record["params_norm"] = trainer.optimizer.parameter_norm()
    if flags.log_num_zeros_in_grad:
        record["num_zeros_in_grad"] = trainer.optimizer.num_zero_grads()
    if not report.applied:
        record["skipped"] = True
    return record


def open_reporter(config: RunConfig, as_dict: dict[str, Any]) -> Reporter:
    """A reporter with the sinks that the flags ask for."""
    flags = config.logging
    sinks: list[Sink] = []
    if flags.metrics_file:
        sinks.append(MetricsFile(flags.metrics_file))
    if flags.tensorboard_dir:
        sinks.append(TensorBoard(flags.tensorboard_dir, flags.tracker_log_interval))
    if flags.wandb_project:
        sinks.append(WeightsAndBiases(flags, as_dict))
    return Reporter(sinks)


def finite(value: Any) -> Any:
    """The value, or None for NaN and infinities, which JSON has no words for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, (int, float))}
