"""--dry-run: valid flags, no data, no files, a verdict."""

from pathlib import Path

import pytest

from megatron.cli.pretrain import main

MODEL = """--num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --exit-layer-nums 2 4 --bf16
    --micro-batch-size 2 --padded-vocab-size 32000 --pipeline-model-parallel-size 2 --lr 1e-4 --train-iters 10
    --attention-dropout 0 --hidden-dropout 0 --dry-run"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)


def test_says_what_the_run_takes_and_writes_nothing(capsys, tmp_path: Path) -> None:
    assert main([*MODEL.split(), "--global-batch-size", "16", "--save", "somewhere", "--device", "A100-40GB"]) == 0
    text = capsys.readouterr().out
    assert "41.87M parameters on 2 x A100-40GB: tp=1 pp=2 dp=1" in text
    assert "layers 1-4; exit 2, 4" in text and "layers 5-8" in text
    assert "8 microbatches" in text and "it fits" in text and "tokens/s" in text
    assert "assumed" not in text
    assert not list(tmp_path.iterdir())


def test_toys_are_told_in_mb(capsys) -> None:
    toy = ["--hidden-size", "32", "--padded-vocab-size", "64", "--seq-length", "16", "--device", "CPU-core"]
    assert main([*MODEL.split(), *toy, "--global-batch-size", "2"]) == 0
    text = capsys.readouterr().out
    assert "1 microbatch," in text and "MB in the table" in text
    assert "0.00 GB" not in text and " 0.00 " not in text and "-0.0%" not in text


def test_for_as_many_processes_as_are_said(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([*MODEL.split(), "--global-batch-size", "16"]) == 0
    assert "on 8 x A100-80GB (assumed: give --device): tp=1 pp=2 dp=4" in capsys.readouterr().out


def test_what_does_not_fit_and_what_would_help(capsys) -> None:
    large = ["--micro-batch-size", "64", "--global-batch-size", "512", "--device", "A100-40GB"]
    assert main([*MODEL.split(), *large, "--seq-length", "4096", "--hidden-size", "1024"]) == 2
    heard = capsys.readouterr()
    assert "it does not fit" in heard.out
    assert "GB more than A100-40GB has: it would with --recompute-granularity full" in heard.err
    assert main([*MODEL.split(), *large, "--seq-length", "4096", "--hidden-size", "16384"]) == 2
    assert "no recompute is enough" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--global-batch-size", "3"], "--micro-batch-size 2 does not divide --global-batch-size 3"),
        (["--num-layers", "7"], "--pipeline-model-parallel-size 2 does not divide --num-layers 7"),
        (["--device", "abacus"], "--device abacus is not known"),
    ],
)
def test_wrong_flags_are_found(words: list[str], said: str, capsys) -> None:
    assert main([*MODEL.split(), *words]) == 2
    assert said in capsys.readouterr().err
