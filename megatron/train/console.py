"""The lines a person reads while a run goes on: one per log interval, with a progress bar on a terminal."""

import sys
import time
from collections import defaultdict

from tqdm import tqdm

from megatron.exits.spec import FINAL
from megatron.logs import get_logger
from megatron.planning.flops import training_flops_per_token
from megatron.train.evaluate import HeadMetrics
from megatron.train.step import StepReport
from megatron.train.trainer import Trainer

log = get_logger(__name__)


class Console:
    """Averages step reports over --log-interval iterations and prints them; owns the progress bar."""

    def __init__(self, trainer: Trainer, last_iteration: int) -> None:
        self._trainer, self._last = trainer, last_iteration
        config = trainer.config
        self._interval = config.logging.log_interval
        self._flops_per_token = training_flops_per_token(config.model, config.exits, trainer.model.padded_vocab_size)
        self._peak_flops = trainer.mesh.backend.peak_flops(next(trainer.model.parameters()).dtype)
        self._losses: dict[str, float] = defaultdict(float)
        self._steps = self._applied = self._tokens = 0
        self._busy = 0.0
        self._seconds_per_step: float | None = None
        self._bar = tqdm(
            total=last_iteration,
            initial=trainer.progress.iteration,
            unit="it",
            disable=not (trainer.mesh.is_main and sys.stderr.isatty()),
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def step(self, report: StepReport, samples: int, seconds: float) -> None:
        """Take in one step; print a line where the interval is full."""
        self._steps += 1
        self._tokens += samples * self._trainer.config.model.seq_length
        self._busy += seconds
        if report.applied:
            self._applied += 1
            for label, value in report.losses.items():
                self._losses[label] += value
        if report.problem:
            self._say(f" iteration {self._trainer.progress.iteration}: skipped, {report.problem}")
        self._bar.update(1)
        if self._trainer.progress.iteration % self._interval == 0:
            self._line(report, samples)

    def _line(self, report: StepReport, samples: int) -> None:
        progress = self._trainer.progress
        seconds = self._busy / self._steps
        self._seconds_per_step = seconds
        rate = self._tokens / self._busy
        flops = rate * self._flops_per_token
        peak = self._peak_flops and self._peak_flops * self._trainer.mesh.world_size
        utilisation = f" (MFU {flops / peak:.1%})" if peak else ""
        parts = [
            f"iteration {progress.iteration:8d}/{self._last:8d}",
            f"consumed samples: {progress.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
            f"learning rate: {report.lr:.3E}",
            f"global batch size: {samples:5d}",
            *(f"{name}: {total / max(self._applied, 1):.6E}" for name, total in self._named_losses()),
            f"loss scale: {report.loss_scale:.1f}",
            f"grad norm: {report.grad_norm:.3f}",
            f"tokens per second: {rate:,.0f}",
            f"model TFLOP/s: {flops / 1e12:.2f}{utilisation}",
            f"peak memory (GB): {self._trainer.mesh.backend.peak_memory_bytes() / 1e9:.2f}",
            f"skipped iterations: {self._steps - self._applied}",
            f"ETA: {duration((self._last - progress.iteration) * seconds)}",
        ]
        self._say(" " + " | ".join(parts))
        self._losses.clear()
        self._steps = self._applied = self._tokens = 0
        self._busy = 0.0

    def _named_losses(self) -> list[tuple[str, float]]:
        """Console names: `lm loss` first, then `early loss [n]`, shallow first."""
        early = [(f"early loss [{label}]", total) for label, total in self._losses.items() if label != FINAL]
        return [("lm loss", self._losses[FINAL]), *early] if FINAL in self._losses else early

    def evaluation(self, title: str, results: dict[str, HeadMetrics], seconds: float) -> None:
        """Print a small table, one line per head."""
        lines = [f" {title} at iteration {self._trainer.progress.iteration} ({seconds:.1f} s)"]
        for label, m in results.items():
            place = "final" if label == FINAL else f"exit {label}"
            known = FINAL in results and label != FINAL
            agreement = f" | agreement with final: {m.agreement:6.2%}" if known else ""
            lines.append(
                f"   {place:>9} | loss: {m.loss:.4f} | ppl: {m.perplexity:10.3f} "
                f"| next-token accuracy: {m.accuracy:6.2%}{agreement}"
            )
        for line in lines:
            self._say(line)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._say(" " + text)

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def _say(self, line: str) -> None:
        self._bar.clear()
        log.info("%s", line)
        self._bar.refresh()


def duration(seconds: float) -> str:
    """`1:02:03`, or `0:07` under an hour."""
    seconds = max(int(seconds), 0)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
