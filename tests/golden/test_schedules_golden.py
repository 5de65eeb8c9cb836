"""Learning rate, weight decay and exit weights over time."""

import json
from dataclasses import astuple
from pathlib import Path

import pytest

from megatron.exits.spec import ExitSpec
from megatron.exits.weights import exit_weight
from megatron.optim.lr import LrSchedule, WeightDecaySchedule
from megatron.schedule.fill import most_fillers, stage_fill


def recorded(golden_dir: Path, file: str) -> list[tuple[str, dict]]:
    rows = [
        (f"{path.parent.name}[{i}]", row)
        for path in sorted(golden_dir.glob(f"*/{file}"))
        for i, row in enumerate(json.loads(path.read_text()))
    ]
    if not rows:
        pytest.skip(f"no {file} in {golden_dir}")
    return rows


def test_learning_rate_and_weight_decay(golden_dir: Path) -> None:
    for name, row in recorded(golden_dir, "lr_wd.json"):
        lr = LrSchedule(
            max_lr=row["max_lr"],
            min_lr=row["min_lr"],
            style=row["lr_decay_style"],
            decay_samples=row["lr_decay_steps"],
            warmup_samples=row["lr_warmup_steps"],
            init_lr=row["init_lr"],
        )
        decay = WeightDecaySchedule(row["start_wd"], row["end_wd"], row["wd_incr_style"], row["wd_incr_steps"])
        for samples, expected_lr, expected_decay, _ in row["num_steps__lr__wd__wd_of_wd_mult0_group"]:
            assert lr.at(samples) == pytest.approx(expected_lr, rel=1e-12), f"{name} at {samples}"
            assert decay.at(samples) == pytest.approx(expected_decay, rel=1e-12), f"{name} at {samples}"


def test_exit_weights(golden_dir: Path) -> None:
    for name, row in recorded(golden_dir, "exit_weight.json"):
        key = next(key for key in row if key.startswith("curr_iteration__"))
        exits = [part.removeprefix("w") for part in key.split("__")[1:]]
        for step, *weights in row[key]:
            for label, expected in zip(exits, weights, strict=True):
                spec = ExitSpec(label, int(label) - 1, "output", row["weight"][label], row["init"][label], 1.0)
                ours = exit_weight(spec, step, row["warmup_iters"], row["style"])
                assert ours == pytest.approx(expected, abs=1e-12), f"{name} exit {label} at step {step}"


def test_fill_counts(golden_dir: Path) -> None:
    for name, row in recorded(golden_dir, "fill_counts.json"):
        stages, ratio = row["pp"], row["backward_forward_ratio"]
        assert most_fillers(stages, ratio) == row["opt_fill"], name
        for expected in row["stages"]:
            # The recorded per-stage counts always use ratio 2: the flag moved only the default number of fillers.
            ours = stage_fill(stages, expected["stage"], row["num_fill_warmup"], row["num_fill_cooldown"])
            theirs = (
                expected["warmup_forwards"],
                max(0, expected["partial_forwards"]),
                expected["next_stage_partial_forwards"],
                expected["partial_backwards"],
                expected["prev_stage_partial_backwards"],
                expected["cooldown_backwards"],
            )
            assert astuple(ours) == theirs, f"{name} stage {expected['stage']}"
