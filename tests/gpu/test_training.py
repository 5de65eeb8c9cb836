"""What only a GPU can show: the same run as on the CPU, exact repeats, and bf16 training."""

import json
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.cli.pretrain import main
from megatron.testing.corpus import training_flags, write_corpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(root: Path, name: str, **changes: object) -> list[dict[str, float]]:
    metrics = root / f"{name}.jsonl"
    if not (root / "corpus.bin").exists():
        write_corpus(root / "corpus")
    assert main(training_flags(root / "corpus", root / "cache", metrics_file=metrics, **changes)) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines if "loss/final" in line]


def test_fp32_losses_equal_the_cpu(tmp_path: Path) -> None:
    plain = {"attention_dropout": 0, "hidden_dropout": 0}
    gpu = losses(tmp_path, "gpu", **plain)
    cpu = losses(tmp_path, "cpu", distributed_backend="gloo", **plain)
    for a, b in zip(gpu, cpu, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_resume_is_exact_with_dropout(tmp_path: Path) -> None:
    save = tmp_path / "save"
    straight = losses(tmp_path, "straight")
    losses(tmp_path, "resumed", save=save, load=save, exit_interval=7)
    assert losses(tmp_path, "resumed", save=save, load=save) == straight


def test_async_save_is_the_same_checkpoint(tmp_path: Path) -> None:
    losses(tmp_path, "sync", save=tmp_path / "sync", save_interval=5)
    losses(tmp_path, "async", save=tmp_path / "async", save_interval=5, async_save=True)
    for iteration in (5, 10, 15, 20):
        a, b = (native.read(recognise(tmp_path / name, iteration).directory) for name in ("sync", "async"))
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("changes", [{"bf16": True}, {"fp16": True, "initial_loss_scale": 2.0**16}])
def test_16_bit_training_learns(tmp_path: Path, changes: dict[str, object]) -> None:
    curve = losses(tmp_path, "m", train_iters=60, **changes)
    assert curve[-1]["loss/final"] < curve[5]["loss/final"] - 0.3
