"""Which checkpoints stay: where the storage refuses, and where only the last few are wanted."""

from pathlib import Path

import pytest
import torch

from megatron import faults
from megatron.checkpoint import native
from megatron.checkpoint.find import TRACKER, recognise
from megatron.checkpoint.state import RunState
from megatron.cli.pretrain import main
from tests.unit.train.conftest import Runs, steps


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def how(request: pytest.FixtureRequest) -> dict[str, object]:
    """The flags of either way to save."""
    return {"async_save": True} if request.param else {}


def test_two_failures_are_survived(runs: Runs, how: dict[str, object], capfd: pytest.CaptureFixture) -> None:
    save = runs.root / "save"
    with faults.armed("native.facts@2:enospc native.facts@3:erofs"):
        lines = steps(runs.train("m", save=save, save_interval=4, **how))
    assert len(lines) == 20
    out = capfd.readouterr().out
    assert "No space left on device; training goes on, and stops after 3 such failures in a row" in out
    assert "Read-only file system; training goes on" in out
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000004", "iter_0000016", "iter_0000020"]


def test_three_in_a_row_end_the_run(runs: Runs, how: dict[str, object], capfd: pytest.CaptureFixture) -> None:
    save = runs.root / "save"
    with faults.armed("native.facts@2:enospc native.facts@3:enospc native.facts@4:enospc"):
        assert main(runs.flags(save=save, save_interval=4, **how)) == 5
    assert "No space left" in capfd.readouterr().err
    assert recognise(save).iteration == 4
    assert {path.name for path in save.iterdir()} == {"iter_0000004", TRACKER, "config.yaml", "run_status.json"}


def test_failures_with_a_success_between_do_not_add_up(runs: Runs, how: dict[str, object]) -> None:
    failing = " ".join(f"native.facts@{n}:enospc" for n in (1, 2, 4, 5))
    with faults.armed(failing):
        assert len(steps(runs.train("m", save=runs.root / "save", save_interval=3, **how))) == 20
    assert recognise(runs.root / "save").iteration == 20


def test_the_last_save_must_succeed(runs: Runs, how: dict[str, object]) -> None:
    with faults.armed("native.facts:enospc"):
        assert main(runs.flags(save=runs.root / "save", **how)) == 5


def test_only_the_last_are_kept(runs: Runs, how: dict[str, object]) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=3, keep_last_n_checkpoints=2, **how)
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000018", "iter_0000020"]


def test_other_formats_and_what_is_protected_stay(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        native.save(tmp_path, iteration, RunState({"model/a": torch.zeros(1)}))
    legacy = tmp_path / "iter_0000009" / "mp_rank_00"
    legacy.mkdir(parents=True)
    (legacy / "model_optim_rng.pt").write_bytes(b"")
    native.prune(tmp_path, 1, 4, {2})
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000004", "iter_0000009"]


def test_one_that_cannot_be_removed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for iteration in (1, 2):
        native.save(tmp_path, iteration, RunState({"model/a": torch.zeros(1)}))
    with faults.armed("commit.remove:erofs"):
        native.prune(tmp_path, 1, 2)
    assert "cannot remove" in caplog.text and recognise(tmp_path, 1).iteration == 1


def kept(save: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


def test_a_damaged_newest_one_does_not_push_out_what_is_saved(runs: Runs, how: dict[str, object]) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=10)
    shard = next((save / "iter_0000020" / "tensors").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    flags = {"save": save, "load": save, "save_interval": 3, "keep_last_n_checkpoints": 1}
    runs.train("m", exit_interval=18, **flags, **how)
    assert kept(save) == [15, 18, 20] and recognise(save).iteration == 18  # 15: known to be good
    runs.train("m", **flags, **how)
    assert kept(save) == [18, 20] and recognise(save).iteration == 20


def test_an_earlier_run_ahead_does_not_push_out_what_is_saved(runs: Runs, how: dict[str, object]) -> None:
    save = runs.root / "save"
    runs.train("first", save=save, save_interval=10)
    runs.train("second", save=save, save_interval=3, exit_interval=9, keep_last_n_checkpoints=2, **how)
    assert kept(save) == [6, 9, 10, 20] and (save / TRACKER).read_text() == "9\n"


def test_rewinding_keeps_what_it_saves(runs: Runs, how: dict[str, object]) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=5)
    flags = {"load": save, "load_iteration": 5, "save_interval": 2, "exit_interval": 9, "keep_last_n_checkpoints": 2}
    runs.train("m", save=save, **flags, **how)
    assert kept(save) == [8, 9, 10, 15, 20]
