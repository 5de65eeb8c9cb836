"""run_status.json: why a run ended, whatever ended it."""

import json

import pytest

from megatron import faults
from megatron.cli.pretrain import main
from tests.unit.train.conftest import Runs


def status(runs: Runs) -> dict:
    return json.loads((runs.root / "save" / "run_status.json").read_text())


def test_finished_and_stopped(runs: Runs) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, exit_interval=4)
    stopped = status(runs)
    assert (stopped["state"], stopped["exit_code"], stopped["iteration"], stopped["run"]) == ("ended", 0, 4, 0)
    assert stopped["reason"] == "--exit-interval 4"
    runs.train("m", save=save, load=save)
    finished = status(runs)
    assert (finished["reason"], finished["iteration"], finished["run"]) == ("finished", 20, 1)


def test_errors(runs: Runs, capfd: pytest.CaptureFixture) -> None:
    with faults.armed("tensors.open:enospc"):
        assert main(runs.flags(save=runs.root / "save", save_interval=2)) == 5
    ended = status(runs)
    assert (ended["state"], ended["exit_code"]) == ("ended", 5)
    assert "No space left" in ended["reason"] and ended["reason"] in capfd.readouterr().err


def test_while_it_runs_and_after_a_kill(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(_trainer, _stop, started) -> str:
        started()
        seen.append(status(runs))
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.cli.pretrain.train", train)
    assert main(runs.flags(save=runs.root / "save")) == 130
    assert seen[0]["state"] == "running" and seen[0]["exit_code"] is None
    assert status(runs)["exit_code"] == 130 and status(runs)["reason"] == "KeyboardInterrupt"


def test_only_beside_checkpoints(runs: Runs) -> None:
    save = runs.root / "save"
    runs.train("m", save=save)
    before = status(runs)
    runs.train("e", load=save, save=save, skip_train=True)
    assert status(runs) == before
