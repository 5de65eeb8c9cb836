import json
from pathlib import Path

import pytest

from megatron.cli.pretrain import main
from megatron.testing.corpus import training_flags, write_corpus


class Runs:
    """Trains toy runs through the command line, in this process, on one corpus."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = write_corpus(root / "corpus")
        self.second = write_corpus(root / "second", seed=1)

    def flags(self, **changes: object) -> list[str]:
        return training_flags(self.corpus, self.root / "cache", **changes)

    def train(self, name: str, **changes: object) -> list[dict]:
        """Run and return the metrics lines that this call appended."""
        metrics = self.root / f"{name}.jsonl"
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        code = main(self.flags(metrics_file=metrics, **changes))
        assert code == 0, f"exit code {code}"
        return [json.loads(line) for line in metrics.read_text().splitlines()[before:]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def steps(lines: list[dict]) -> list[dict]:
    """The training lines of a metrics file, without timings and the number of the start."""
    noisy = ("step_time_s", "tokens_per_s", "peak_memory_bytes", "run")
    return [{k: v for k, v in line.items() if k not in noisy} for line in lines if "loss/final" in line]
