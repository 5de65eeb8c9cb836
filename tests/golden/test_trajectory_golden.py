"""Twenty iterations, started by the real command line: losses of every head, learning rate and gradient norm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.argv import redirect
from tests.golden.conftest import read_case

ROOT = Path(__file__).resolve().parents[2]
RELATIVE = 1e-4


def recorded_rows(case_dir: Path) -> dict[int, dict]:
    """Iteration -> what the ranks logged together: each pipeline stage logs the heads it owns."""
    rows: dict[int, dict] = {}
    for path in sorted(case_dir.glob("log.rank*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            merged = rows.setdefault(row["iteration"], {"loss": {}})
            merged["loss"] |= row["loss"] or {}
            merged["lr_after_step"], merged["grad_norm"] = row["lr_after_step"], row["grad_norm"][0]
    return rows


def run_training(argv: list[str], processes: int, tmp_path: Path) -> list[dict]:
    metrics = tmp_path / "metrics.jsonl"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(ROOT / "pretrain_early_exit_gpt.py"), *argv, "--metrics-file", str(metrics)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def test_trajectory(trajectory_case: Path, golden_dir: Path, tmp_path: Path) -> None:
    case = read_case(trajectory_case)
    argv = redirect(case["argv"], golden_dir, tmp_path)
    if "--fill-explicit-bubbles" in argv:
        argv += ["--fill-loss-normalization", "original"]
    expected = recorded_rows(trajectory_case)
    ours = run_training(argv, case["world_size"], tmp_path)
    assert [line["iteration"] for line in ours] == sorted(expected)
    for line in ours:
        theirs = expected[line["iteration"]]
        where = f"iteration {line['iteration']}"
        for name, value in theirs["loss"].items():
            kind, _, label = name.partition(" [")
            label = label.rstrip("]")
            if name == "lm loss":
                assert line["loss/final"] == pytest.approx(value, rel=RELATIVE), where
            elif kind == "early loss":
                assert line[f"loss/exit_{label}"] == pytest.approx(value, rel=RELATIVE), where
            elif kind == "exit weight":
                assert line[f"weight/exit_{label}"] == pytest.approx(value, rel=1e-6), where
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=RELATIVE), where
        before = expected.get(line["iteration"] - 1)
        if before is not None:
            assert line["lr"] == pytest.approx(before["lr_after_step"], rel=RELATIVE), where
