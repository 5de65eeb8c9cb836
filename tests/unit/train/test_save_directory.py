"""What lies under --save when a run starts: refused, replaced or said."""

from megatron.checkpoint.find import recognise
from megatron.cli.pretrain import main
from megatron.train.step import train_step
from tests.unit.train.conftest import Runs


def test_save_directory_of_the_other_format_is_refused_at_once(runs: Runs, capfd) -> None:
    directory = runs.root / "save" / "iter_0000004" / "mp_rank_00"
    directory.mkdir(parents=True)
    (directory / "model_optim_rng.pt").write_bytes(b"")
    assert main(runs.flags(save=runs.root / "save")) == 4
    assert "iteration 4 in Megatron's format, which is never replaced" in capfd.readouterr().err


def test_save_directory_with_foreign_content_is_refused_at_once(runs: Runs, capfd) -> None:
    (runs.root / "save" / "iter_0000004").mkdir(parents=True)
    (runs.root / "save" / "iter_0000004" / "notes.txt").write_text("mine")
    assert main(runs.flags(save=runs.root / "save")) == 4
    assert "iter_0000004, which is no checkpoint and never replaced" in capfd.readouterr().err


def test_foreign_content_that_comes_while_it_trains_is_a_failed_save(runs: Runs, capfd, monkeypatch) -> None:
    save = runs.root / "save"

    def step(trainer, batches, recorder=None):
        if trainer.progress.iteration == 5:
            (save / "iter_0000008").mkdir()
            (save / "iter_0000008" / "notes.txt").write_text("mine")
        return train_step(trainer, batches)

    monkeypatch.setattr("megatron.train.loop.train_step", step)
    runs.train("m", save=save, save_interval=4)
    assert "unknown content" in capfd.readouterr().out and recognise(save).iteration == 20
    assert (save / "iter_0000008" / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_ahead_is_replaced(runs: Runs, capfd) -> None:
    """It lost all by which checkpoints are told."""
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=10)
    for name in ("manifest.json", "facts.json"):
        (save / "iter_0000020" / name).unlink()
    runs.train("m", save=save, load=save)
    out = capfd.readouterr().out
    assert "iter_0000020 was not written to its end" in out and "looking for an older one" in out
    assert recognise(save).iteration == 20


def test_an_earlier_run_ahead_of_this_one_is_said(runs: Runs, capfd) -> None:
    runs.train("first", save=runs.root / "save", exit_interval=4)
    runs.train("second", save=runs.root / "save", exit_interval=2)
    out = capfd.readouterr().out
    assert "holds iterations 4 to 4 of an earlier run: this one starts at 0" in out and "--load-iteration" not in out


def test_rewinding_in_place_is_advised_against(runs: Runs, capfd) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=5)
    runs.train("m", load=save, save=save, load_iteration=10, exit_interval=11)
    assert (
        "a restart without --load-iteration takes iteration 20: give a new --save directory" in capfd.readouterr().out
    )
    runs.train("m", load=save, save=runs.root / "new", load_iteration=10, exit_interval=11)
    assert "--save directory" not in capfd.readouterr().out
