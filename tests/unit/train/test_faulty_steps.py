"""NaN, Inf and spikes in losses, hidden states and gradients: no bit of the state changes, and the place is named."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron.checkpoint.find import recognise
from megatron.cli.pretrain import main
from megatron.config.load import load
from megatron.config.training import TrainingConfig
from megatron.errors import CheckpointError
from megatron.parallel.placement import views
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.data import make_datasets, microbatches, step_batches
from megatron.train.spikes import SpikeWatch
from megatron.train.step import train_step
from megatron.train.trainer import Trainer
from tests.unit.train.conftest import Runs, steps

PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True, "initial_loss_scale": 256}}
WATCHED = {"check_for_spiky_loss": True, "check_for_large_grads": True, "spike_factor": 1.5}
VALUES = {"nan": math.nan, "inf": math.inf, "spike": 40.0}
MICROBATCH = 2  # of four


@pytest.fixture(scope="module", params=PRECISIONS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Iterator]:
    """A run, some steps under way."""
    runs = Runs(tmp_path_factory.mktemp(request.param))
    exits = {"use_exit_mlp": True, "untie_exit_output_weights": True}
    precision = PRECISIONS[request.param]
    flags = runs.flags(attention_dropout=0, hidden_dropout=0, train_iters=100, **exits, **WATCHED, **precision)
    trainer = build_trainer(load(flags).config)
    checkpoints.start(trainer)
    stream = microbatches(trainer, make_datasets(trainer).train, 0)
    while trainer.optimizer.steps < 12:
        train_step(trainer, step_batches(trainer, stream))
    return trainer, stream


@contextmanager
def in_forward(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what `module` returns in one microbatch of a step."""
    calls = []

    def hook(_module: nn.Module, _inputs: object, out: object) -> object:
        calls.append(1)
        if len(calls) != MICROBATCH + 1:
            return None
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_gradient(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = parameter.register_hook(change)
    try:
        yield
    finally:
        handle.remove()


def one_entry(value: float, large: float) -> Callable[[Tensor], Tensor]:
    """One entry becomes NaN or Inf; or, for a spike, all are multiplied by `large`."""

    def change(tensor: Tensor) -> Tensor:
        if math.isfinite(value):
            return tensor * large
        mask = torch.zeros_like(tensor)
        mask.view(-1)[5] = value
        return tensor + mask

    return change


def inject(trainer: Trainer, place: str, value: float) -> AbstractContextManager:
    model = trainer.model
    loud = one_entry(value, 300.0)
    forward = {
        "exit 1": lambda: model.exits["1"].branch,
        "exit 3": lambda: model.exits["3"].branch,
        "final": lambda: model.final_norm,
        "embedding": lambda: model.embedding,
        "layer 2": lambda: model.layers["1"].mlp,
    }
    if place in forward:
        return in_forward(forward[place](), loud)
    gradients = {
        "gradient of a layer": model.layers["2"].mlp.up.weight,
        "gradient of an exit": model.exits["3"].branch.up.weight,
    }
    return in_gradient(gradients[place], one_entry(value, 1e4))


PLACES = {
    # where it goes in -> what the message must name
    "exit 1": "exit 1", "exit 3": "exit 3", "final": "final", "embedding": "exit 1", "layer 2": "exit 3",
    "gradient of a layer": "layers.2.mlp.up.weight", "gradient of an exit": "exits.3.",
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_no_bit_changes_and_the_place_is_named(run: tuple[Trainer, Iterator], place: str, kind: str) -> None:
    trainer, stream = run
    before = {name: tensor.clone() for name, tensor in views(checkpoints.state_tensors(trainer)).items()}
    done, progress = trainer.optimizer.steps, replace(trainer.progress)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with inject(trainer, place, VALUES[kind]):
        report = train_step(trainer, step_batches(trainer, stream))
    assert not report.applied
    assert PLACES[place] in report.problem and "rank dp=0 pp=0 tp=0" in report.problem
    assert ("spike" in report.problem) == (kind == "spike")
    if "gradient" not in place:
        assert f"microbatch {MICROBATCH}" in report.problem
    after = views(checkpoints.state_tensors(trainer))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert trainer.optimizer.steps == done and trainer.progress.optimizer_samples == progress.optimizer_samples
    assert trainer.progress.consumed_samples == progress.consumed_samples + 8
    assert train_step(trainer, step_batches(trainer, stream)).applied  # and the next step is as any other


@pytest.fixture
def spiky_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the iterations in which the final hidden states shall be far too large."""

    def arm(*iterations: int) -> None:
        def step(trainer: Trainer, batches: list, recorder: object = None) -> object:
            bad = trainer.progress.iteration + 1 in iterations
            handle = trainer.model.final_norm.register_forward_hook(lambda _m, _i, out: out * 300.0 if bad else out)
            try:
                return train_step(trainer, batches)
            finally:
                handle.remove()

        monkeypatch.setattr("megatron.train.loop.train_step", step)

    return arm


def test_a_spike_is_skipped_said_and_training_goes_on(runs: Runs, spiky_steps: Callable[..., None], capfd) -> None:
    spiky_steps(15)
    lines = steps(runs.train("m", check_for_spiky_loss=True, spike_factor=3))
    assert [line["iteration"] for line in lines if line.get("skipped")] == [15]
    assert "iteration 15: skipped, a spike: the final loss is" in capfd.readouterr().out


def test_nothing_is_watched_unless_asked_for(runs: Runs, spiky_steps: Callable[..., None]) -> None:
    spiky_steps(15)
    assert not any(line.get("skipped") for line in steps(runs.train("m")))


@pytest.mark.parametrize("stop", [3, 11, 14])
def test_a_resumed_run_judges_as_the_uninterrupted_one(runs: Runs, spiky_steps: Callable[..., None], stop: int) -> None:
    spiky_steps(11, 15)
    whole = steps(runs.train("whole", **WATCHED))
    assert [line["iteration"] for line in whole if line.get("skipped")] == [11, 15]
    save = runs.root / "save"
    runs.train("parts", save=save, load=save, exit_interval=stop, **WATCHED)
    assert steps(runs.train("parts", save=save, load=save, **WATCHED)) == whole[stop:]


def test_spikes_that_do_not_end_end_the_run(runs: Runs, spiky_steps: Callable[..., None], capfd) -> None:
    spiky_steps(*range(14, 21))
    save = runs.root / "save"
    flags = {"save": save, "save_interval": 4, "max_nonfinite_steps": 5, "check_for_large_grads": True}
    assert main(runs.flags(**flags)) == 3
    error = capfd.readouterr().err
    assert "5 steps in a row were skipped" in error and "a spike: gradient norm" in error
    assert f"--load {save} --load-iteration 12" in error and recognise(save).iteration == 12


def test_the_first_steps_are_no_yardstick() -> None:
    watch = SpikeWatch(TrainingConfig(check_for_spiky_loss=True, check_for_large_grads=True, spike_factor=2.0))
    for _ in range(9):
        watch.note({"final": [1.0, 1.0]}, 3.0)
    assert watch.loss_problem({"final": [50.0, 50.0]}) is None and watch.grad_limit() is None
    watch.note({"final": [1.0, 1.0]}, 3.0)
    said = watch.loss_problem({"final": [1.0, 3.1]})
    assert "the final loss is 4.1, more than 2 times its mean 2 (most of it from microbatch 1)" in said
    assert watch.loss_problem({"final": [1.0, 2.9]}) is None and watch.grad_limit() == 6.0
    for _ in range(100):
        watch.note({"final": [4.0]}, 1.0)
    assert watch.grad_limit() == 2.0  # a hundred steps are remembered, no more


def test_what_is_not_finite_is_not_remembered(runs: Runs) -> None:
    """Without the check for NaN such a step is applied, and its checkpoint must be one."""
    watch = SpikeWatch(TrainingConfig(check_for_spiky_loss=True, check_for_large_grads=True))
    watch.note({"final": [1.0, math.nan], "1": [2.0]}, math.inf)
    assert watch.facts() == {"1": [2.0]}
    save, flags = runs.root / "save", {"check_for_large_grads": True, "no_check_for_nan_in_loss_and_grad": True}
    trainer = build_trainer(load(runs.flags(save=save, **flags)).config)
    checkpoints.start(trainer)
    with torch.no_grad():
        trainer.model.final_norm.weight[0] = math.nan
    assert train_step(trainer, step_batches(trainer, microbatches(trainer, make_datasets(trainer).train, 0))).applied
    assert checkpoints.save(trainer).is_dir()


@pytest.mark.parametrize("facts", [[1], {"final": 3}, {"final": ["x"]}])
def test_damaged_facts_are_refused(facts: object) -> None:
    with pytest.raises(CheckpointError, match="spike_watch"):
        SpikeWatch(TrainingConfig()).restore(facts)
