"""What a run reports: a stream of flat dicts, sent to every sink that the flags ask for, by one rank."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from megatron.config.run import LoggingConfig, RunConfig
from megatron.errors import ConfigError, StorageError


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
        self._writer, self._interval = SummaryWriter(directory), interval

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
        self._run = wandb.init(
            project=flags.wandb_project,
            group=flags.wandb_group,
            name=flags.wandb_exp_name,
            dir=flags.wandb_save_dir,
            config=config,
        )
        self._interval = flags.tracker_log_interval

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Log the numeric values."""
        if iteration % self._interval == 0 or any(key.startswith("eval/") for key in record):
            self._run.log(_numbers(record), step=iteration)

    def close(self) -> None:
        """End the wandb run."""
        self._run.finish()


def open_sinks(config: RunConfig, as_dict: dict[str, Any]) -> list[Sink]:
    """The sinks that the flags ask for."""
    flags = config.logging
    sinks: list[Sink] = []
    if flags.metrics_file:
        sinks.append(MetricsFile(flags.metrics_file))
    if flags.tensorboard_dir:
        sinks.append(TensorBoard(flags.tensorboard_dir, flags.tracker_log_interval))
    if flags.wandb_project:
        sinks.append(WeightsAndBiases(flags, as_dict))
    return sinks


def finite(value: Any) -> Any:
    """The value, or None for NaN and infinities, which JSON has no words for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, (int, float))}
