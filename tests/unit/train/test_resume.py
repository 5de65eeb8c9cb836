"""Stop anywhere, resume: bit for bit the run that never stopped (fp32, CPU, dropout on)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.cli.pretrain import main
from megatron.testing.runs import train_changing_micro_batch
from tests.unit.train.conftest import Runs, steps

SCRIPT = Path(__file__).parents[3] / "pretrain_early_exit_gpt.py"
RAMPED = {"exit_layer_weight_init": "0.0 1.0", "exit_layer_weight_warmup_iters": 12}


def final_state(directory: Path) -> tuple[dict[str, torch.Tensor], dict]:
    found = recognise(directory)
    state = native.read(found.directory)
    kept = ("iteration", "consumed_samples", "optimizer_samples", "optimizer_step", "grad_scaler", "skipped_steps")
    return state.tensors, {key: state.facts[key] for key in kept}


def assert_same_end(a: Path, b: Path) -> None:
    tensors_a, facts_a = final_state(a)
    tensors_b, facts_b = final_state(b)
    assert facts_a == facts_b
    assert tensors_a.keys() == tensors_b.keys()
    different = [name for name in tensors_a if not same_bits(tensors_a[name], tensors_b[name])]
    assert not different


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """0 and -0 are two things, NaN is itself."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (a, b)))


def resumed(runs: Runs, k: int, **changes: object) -> list[dict]:
    save = runs.root / "resumed"
    first = runs.train("resumed", save=save, load=save, exit_interval=k, **changes)
    second = runs.train("resumed", save=save, load=save, **changes)
    assert [line["iteration"] for line in steps(first)] == list(range(1, k + 1))
    assert {line["run"] for line in second} == {1}
    return steps(first) + steps(second)


VARIANTS = {
    "gpt": {},
    "ramped_blend": {**RAMPED, "data_path": "0.3 {corpus} 0.7 {second}"},
    "llama_cyclic": {
        "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True, "untie_exit_output_weights": True, "exit_norm": "own",
        "use_exit_mlp": True, "dataloader_type": "cyclic",
    },
    "sgd_rampup": {
        "optimizer": "sgd", "train_iters": None, "train_samples": 120, "rampup_batch_size": "4 2 60",
        "lr_warmup_iters": None, "lr_warmup_samples": 12,
    },
    "bf16": {"bf16": True},
    "fp16_with_skipped_steps": {"fp16": True, "initial_loss_scale": 2.0**24, "hysteresis": 1},
    "documents_apart": {
        "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True,
        "calculate_per_token_loss": True, "lr_decay_style": "inverse-square-root",
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2,
        "weight_decay_incr_style": "linear", "start_weight_decay": 0.01, "end_weight_decay": 0.1,
    },
    "no_exits": {"exit_layer_nums": None, "exit_layer_weight": None, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 5},
    "tied_mlp_saved_by_a_thread": {
        "use_exit_mlp": True, "exit_norm": "final", "async_save": True, "save_interval": 3,
    },
    "untied_blocks_before_layers": {
        "use_exit_block": True, "untie_exit_output_weights": True, "pre_exit": True, "exit_norm": "own",
        "weight_decay_incr_style": "cosine", "start_weight_decay": 0.0, "end_weight_decay": 0.1,
    },
    "confident_exits_per_token": {
        **RAMPED, "exit_layer_weight_warmup_style": "cosine", "use_dynamic_exit_layer_weight": True,
        "exit_layer_temperature": "1.5 0.7", "calculate_per_token_loss": True, "eod_mask_loss": True,
        "recompute_granularity": "selective",
    },
    "bf16_sgd_saved_by_a_thread": {
        "bf16": True, "optimizer": "sgd", "async_save": True, "save_interval": 2, "keep_last_n_checkpoints": 1,
        "use_exit_block": True,
    },
    "fp16_with_growing_scale": {
        **RAMPED, "fp16": True, "initial_loss_scale": 2.0**8, "loss_scale_window": 3, "num_workers": 2,
        "data_path": "0.3 {corpus} 0.7 {second}",
    },
}  # fmt: skip


def variant(runs: Runs, name: str) -> dict[str, object]:
    places = {"corpus": runs.corpus, "second": runs.second}
    return {k: v.format(**places) if isinstance(v, str) else v for k, v in VARIANTS[name].items()}


def check_resume(runs: Runs, name: str, k: int) -> None:
    changes = variant(runs, name)
    straight = steps(runs.train("straight", save=runs.root / "straight", **changes))
    assert resumed(runs, k, **changes) == straight
    assert_same_end(runs.root / "straight", runs.root / "resumed")


@pytest.mark.parametrize(
    ("name", "k"),
    [("gpt", 1), ("gpt", 13), ("ramped_blend", 7), ("ramped_blend", 19), ("llama_cyclic", 7), ("sgd_rampup", 7),
     ("bf16", 13), ("fp16_with_skipped_steps", 7), ("documents_apart", 13), ("tied_mlp_saved_by_a_thread", 7),
     ("untied_blocks_before_layers", 13)],
)  # fmt: skip
def test_resume_is_exact(runs: Runs, name: str, k: int) -> None:
    check_resume(runs, name, k)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("k", [1, 7, 13, 19])
def test_resume_is_exact_everywhere(runs: Runs, name: str, k: int) -> None:
    check_resume(runs, name, k)


def test_same_command_twice_gives_the_same_bits(runs: Runs) -> None:
    """Nor do processes that read make a difference."""
    first = steps(runs.train("first", save=runs.root / "a", train_iters=50))
    second = steps(runs.train("second", save=runs.root / "b", train_iters=50, num_workers=2))
    assert first == second
    assert_same_end(runs.root / "a", runs.root / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_same_command_twice_gives_the_same_bits_everywhere(runs: Runs, name: str) -> None:
    """Again in this process, and in one that hashes otherwise and reads with another number of processes."""
    changes = variant(runs, name)
    changes |= {"train_samples": 400} if "train_samples" in changes else {"train_iters": 50}
    first = steps(runs.train("first", save=runs.root / "first", **changes))
    assert len(first) >= 50
    assert steps(runs.train("second", save=runs.root / "second", **changes)) == first
    assert_same_end(runs.root / "first", runs.root / "second")

    metrics = runs.root / "third.jsonl"
    changes |= {"num_workers": 1 if "num_workers" in changes else 3}
    command = [sys.executable, str(SCRIPT), *runs.flags(save=runs.root / "third", metrics_file=metrics, **changes)]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    assert steps([json.loads(line) for line in metrics.read_text().splitlines()]) == first
    assert_same_end(runs.root / "first", runs.root / "third")


def test_micro_batch_size_may_change_on_resume(runs: Runs) -> None:
    """Saved at 8 with micro-batches of 2 and resumed with 4 = the uninterrupted run that changes at 8."""
    save = runs.root / "stopped"
    before = runs.train("stopped", save=save, exit_interval=8)
    after = runs.train("stopped", save=save, load=save, micro_batch_size=4)
    stopped = steps(before) + steps(after)

    whole = runs.root / "whole"
    losses = train_changing_micro_batch(runs.flags(save=whole), at=8, micro_batch_size=4)
    assert [(line["loss/final"], line["loss/exit_1"], line["loss/exit_3"], line["grad_norm"]) for line in stopped] == [
        (row["final"], row["1"], row["3"], norm) for row, norm in losses
    ]
    assert_same_end(save, whole)


def test_evaluation_moves_nothing(runs: Runs) -> None:
    """Evaluating in between must not disturb data order, dropout or weights."""
    plain = steps(runs.train("plain", save=runs.root / "a"))
    evaluated = steps(runs.train("evaluated", save=runs.root / "b", eval_interval=3))
    assert plain == evaluated


def test_checkpoint_alone_is_enough_to_go_on(runs: Runs) -> None:
    save = runs.root / "straight"
    straight = steps(runs.train("straight", save=save))
    stopped = runs.root / "stopped"
    runs.train("stopped", save=stopped, exit_interval=10)
    metrics = runs.root / "alone.jsonl"
    assert main(["--load", str(stopped), "--save", str(stopped), "--metrics-file", str(metrics)]) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert steps(lines) == straight[10:]
