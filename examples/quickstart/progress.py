"""What the quickstart says while it runs: lines for people, and training's progress read from its metrics file."""

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from tqdm import tqdm

REPORTS = 10  # in a run, where there is no terminal to draw a bar on
AVERAGED = 50  # steps


def say(text: str = "") -> None:
    """One line to standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """`4:05` minutes."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


class TrainingProgress:
    """Follows a growing metrics file: a bar on a terminal, elsewhere a line at each tenth of the run."""

    def __init__(self, metrics: Path, iterations: int, tokens_per_iteration: int) -> None:
        self._path, self._iterations, self._tokens = metrics, iterations, tokens_per_iteration
        self._offset = metrics.stat().st_size if metrics.exists() else 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=AVERAGED)
        self._started = time.monotonic()
        self._first: int | None = None
        self._reported = 0
        self.iteration = 0
        self._bar = tqdm(
            total=iterations, unit="step", desc="   ", dynamic_ncols=True, disable=None, leave=False, smoothing=0.05
        )

    def update(self) -> None:
        """Read what was added, and show it."""
        for row in self._new_rows():
            if "loss/final" in row:
                self._recent.append(row)
                self.iteration = row["iteration"]
                if self._first is None:
                    self._first = self.iteration - 1
                    self._bar.initial = self._bar.n = self._first
        if not self._recent:
            return
        self._bar.set_postfix_str(self._losses(), refresh=False)
        self._bar.update(self.iteration - self._bar.n)
        report = self.iteration * REPORTS // self._iterations
        if self._bar.disable and report > self._reported:
            self._reported = report
            say(f"   {self.line()}, {clock(self._seconds_left())} left")

    def line(self) -> str:
        """How far training is, in words."""
        speed = self._tokens * len(self._recent) / sum(row["step_time_s"] for row in self._recent)
        done = self.iteration * self._tokens
        share = f"{self.iteration / self._iterations:4.0%}"
        return f"{share}  {done / 1e6:.2f}M tokens, {speed:,.0f} a second; {self._losses()}"

    def close(self) -> None:
        """Remove the bar; say where training ended."""
        self._bar.close()
        if self._recent and not self._bar.disable:
            say(f"   {self.line()}")

    def _losses(self) -> str:
        names = sorted((name for name in self._recent[-1] if name.startswith("loss/exit_")), key=lambda n: int(n[10:]))
        parts = []
        for name in [*names, "loss/final"]:
            values = [row[name] for row in self._recent if row.get(name) is not None]
            title = "full" if name == "loss/final" else name[5:].replace("_", " ")
            parts.append(f"{title} {sum(values) / max(1, len(values)):.2f}")
        return "loss: " + ", ".join(parts)

    def _seconds_left(self) -> float:
        done = self.iteration - (self._first or 0)
        return (time.monotonic() - self._started) / max(1, done) * (self._iterations - self.iteration)

    def _new_rows(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]
