"""tools/verify_checkpoint.py: what it says of whole, damaged and foreign checkpoints, and how it ends."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.state import RunState
from megatron.cli.verify_checkpoint import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for iteration in (3, 4):
        tensors = {"model/a": torch.zeros(2, 3), "model/b": torch.zeros(4), "optimizer/exp_avg/a": torch.zeros(2, 3)}
        native.save(tmp_path, iteration, RunState(tensors, {"consumed_samples": 12, "torch": "2.13.0"}))
    return tmp_path


def test_whole(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("  whole: ") == 2 and out.index("iter_0000003") < out.index("iter_0000004")
    assert "iteration 3, 12 samples, written with torch 2.13.0" in out
    assert "2 model tensors, 1 optimizer tensors; 10 parameters" in out


def test_one_of_them_with_its_tensors(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(root / "iter_0000004"), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "iter_0000003" not in out and "    model/a [2, 3] float32\n" in out


def test_damaged(root: Path, capsys: pytest.CaptureFixture) -> None:
    path = root / "iter_0000004" / "facts.json"
    path.write_text(path.read_text().replace("12", "13"))
    assert main([str(root)]) == 4
    out, error = capsys.readouterr()
    assert "DAMAGED" in out and "facts.json has another content than was written" in out
    assert error == "error: 1 of 2 damaged: iter_0000004\n"


def test_damaged_beyond_recognition(root: Path, capsys: pytest.CaptureFixture) -> None:
    """It lost its manifest and its facts, or all; it is still the newest one of that directory."""
    for name in ("manifest.json", "facts.json"):
        (root / "iter_0000004" / name).unlink()
    (root / "iter_0000005").mkdir()
    assert main([str(root)]) == 4
    out, error = capsys.readouterr()
    assert out.count("DAMAGED") == 2 and out.count("was not written to its end") == 2
    assert error == "error: 2 of 3 damaged: iter_0000004, iter_0000005\n"
    assert main([str(root / "iter_0000004")]) == 4


def test_what_lies_there_beside_it_is_said(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "manifest.json").write_text("{}")
    (root / "iter_0000004" / ".DS_Store").write_text("")
    assert main([str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("  whole: ") == 2 and out.count("  not part of it, and not read: .DS_Store\n") == 1


def test_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "nowhere")]) == 4
    assert "holds no checkpoint" in capsys.readouterr().err
    directory = tmp_path / "iter_0000001" / "mp_rank_00"
    directory.mkdir(parents=True)
    (directory / "model_optim_rng.pt").write_bytes(b"")
    assert main([str(tmp_path)]) == 0
    assert "carries no checksums" in capsys.readouterr().out
