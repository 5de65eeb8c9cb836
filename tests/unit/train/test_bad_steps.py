"""Steps that are not finite: skipped, named, survived, and never the newest checkpoint's."""

import json
import math
import shutil

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.cli.pretrain import main
from megatron.config.load import load
from megatron.errors import NonFiniteError
from megatron.parallel.placement import views
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.data import make_datasets, microbatches, step_batches
from megatron.train.loop import train
from megatron.train.step import train_step
from tests.unit.train.conftest import Runs, steps


def poisoned(runs: Runs, **changes: object):
    trainer = build_trainer(load(runs.flags(**changes)).config)
    checkpoints.start(trainer)
    return trainer


def test_non_finite_step_changes_nothing_and_is_named(runs: Runs) -> None:
    trainer = poisoned(runs, exit_norm="own")
    stream = microbatches(trainer, make_datasets(trainer).train, 0)
    train_step(trainer, step_batches(trainer, stream))
    with torch.no_grad():
        trainer.model.exits["3"].norm.weight[0] = math.nan
    before = {name: tensor.clone() for name, tensor in views(checkpoints.state_tensors(trainer)).items()}
    report = train_step(trainer, step_batches(trainer, stream))
    assert not report.applied
    assert "the loss of exit 3 in microbatch 0" in report.problem and "exit 1" not in report.problem
    after = views(checkpoints.state_tensors(trainer))
    assert all(torch.equal(before[name].nan_to_num(9), after[name].nan_to_num(9)) for name in before)
    assert trainer.progress.skipped_steps == 1


@pytest.mark.parametrize("precision", [{}, {"fp16": True}])
def test_stops_after_many_non_finite_steps(runs: Runs, precision: dict[str, object]) -> None:
    trainer = poisoned(runs, max_nonfinite_steps=3, metrics_file=runs.root / "m.jsonl", **precision)
    with torch.no_grad():
        trainer.model.embedding.word.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train(trainer)
    lines = [json.loads(line) for line in (runs.root / "m.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [True] * 3
    assert lines[0]["loss/final"] is None and lines[0]["grad_norm"] is None


def test_names_the_last_checkpoint_known_to_be_good(runs: Runs, capfd) -> None:
    """An absurd learning rate: the checkpoints whose weights give no finite loss don't count."""
    save = runs.root / "save"
    flags = {"lr": 1e30, "lr_warmup_iters": 5, "lr_decay_style": "constant", "clip_grad": 0, "min_lr": 0}
    assert main(runs.flags(save=save, save_interval=1, max_nonfinite_steps=4, **flags)) == 3
    error = capfd.readouterr().err
    good = int(error.split("--load-iteration ")[1].split(".")[0])
    evaluated = runs.train("e", load=save, load_iteration=good, skip_train=True, **flags)
    assert evaluated[0]["eval/loss/final"] is not None
    assert recognise(save).iteration <= good + 1


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch):
    """Call it with the iterations whose loss shall be NaN."""

    def arm(*iterations: int) -> None:
        def step(trainer, batches, recorder=None):
            norm = trainer.model.final_norm
            bad = trainer.progress.iteration + 1 in iterations
            hook = norm.register_forward_hook(lambda _module, _inputs, out: out * (math.nan if bad else 1))
            try:
                return train_step(trainer, batches)
            finally:
                hook.remove()

        monkeypatch.setattr("megatron.train.loop.train_step", step)

    return arm


def test_a_bad_last_step_loses_nothing(runs: Runs, bad_steps) -> None:
    bad_steps(10)
    save = runs.root / "save"
    lines = steps(runs.train("m", save=save, exit_interval=10))
    assert lines[-1]["skipped"] and recognise(save).iteration == 10
    before = runs.root / "before"
    bad_steps()
    runs.train("n", save=before, exit_interval=9)
    theirs, ours = (native.read(recognise(root).directory).tensors for root in (before, save))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_save_is_put_off_until_a_step_is_finite(runs: Runs, bad_steps, capfd) -> None:
    bad_steps(4, 5)
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=4, exit_interval=7)
    assert "saving is put off: skipped steps in a row: 1" in capfd.readouterr().out
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000006", "iter_0000007"]


def test_a_stop_among_bad_steps_is_said_and_forgets_no_good_one(runs: Runs, bad_steps, capfd) -> None:
    """What is saved then is the newest; a restart knows the one that a message should name, and keeps it."""
    bad_steps(*range(6, 21))
    save, other = runs.root / "save", runs.root / "other"
    runs.train("m", save=save, save_interval=2, exit_interval=7, keep_last_n_checkpoints=1)
    assert "the last 2 steps were skipped: the weights that are saved now gave no finite loss" in capfd.readouterr().out
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000004", "iter_0000007"]
    for flags in ({"save": save, "keep_last_n_checkpoints": 1}, {"save": other}, {}):
        assert main(runs.flags(load=save, max_nonfinite_steps=3, save_interval=1, **flags)) == 3
        error = capfd.readouterr().err
        assert f"known to be good is --load {save} --load-iteration 4. " in error
        assert "with a new --save directory" in error and "bf16" not in error and "--spike-factor" not in error
    runs.train("m", load=save, save=save, max_nonfinite_steps=9, exit_interval=10, keep_last_n_checkpoints=1)
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000004", "iter_0000010"]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [({"fp16": True, "loss_scale": 1.0}, "raise --lr-warmup-iters, or train in bf16 or fp32"),
     ({"check_for_large_grads": True}, "raise --lr-warmup-iters, or raise --spike-factor")],
)  # fmt: skip
def test_advice_is_of_this_run(runs: Runs, bad_steps, capfd, flags: dict[str, object], advice: str) -> None:
    bad_steps(*range(1, 21))
    assert main(runs.flags(max_nonfinite_steps=3, **flags)) == 3
    assert f"Lower --lr, {advice}" in capfd.readouterr().err


def test_a_good_one_that_is_gone_is_not_named(runs: Runs, bad_steps, capfd) -> None:
    bad_steps(*range(6, 21))
    save = runs.root / "save"
    runs.train("m", save=save, save_interval=2, exit_interval=6)
    for name in ("iter_0000002", "iter_0000004"):
        shutil.rmtree(save / name)
    assert main(runs.flags(load=save, save=save, max_nonfinite_steps=3)) == 3
    assert "there is no checkpoint from before" in capfd.readouterr().err


def test_non_finite_gradients_are_named(runs: Runs) -> None:
    trainer = poisoned(runs)
    weight = trainer.model.layers["2"].mlp.up.weight
    weight.register_hook(lambda grad: grad * math.inf)
    report = train_step(trainer, step_batches(trainer, microbatches(trainer, make_datasets(trainer).train, 0)))
    assert not report.applied
    assert "layers.2.mlp.up.weight" in report.problem and "rank dp=0 pp=0 tp=0" in report.problem
