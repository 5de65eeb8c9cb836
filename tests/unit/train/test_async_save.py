"""`--async-save`: the same checkpoint as without it, written while training goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron import faults
from megatron.checkpoint import manifest, native
from megatron.checkpoint.find import recognise
from megatron.checkpoint.snapshot import Snapshot
from megatron.config.load import load
from megatron.errors import ConfigError
from megatron.parallel.backend import Backend
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.data import make_datasets, microbatches, step_batches
from megatron.train.saving import Saver
from megatron.train.step import train_step
from tests.unit.train.conftest import Runs, steps

SCRIPT = Path(__file__).parents[3] / "pretrain_early_exit_gpt.py"
CPU = Backend.choose("gloo")


def test_same_files_as_without(runs: Runs) -> None:
    """Slow writing lets training change every weight while they are written."""
    plain, background = runs.root / "plain", runs.root / "background"
    runs.train("m", save=plain, save_interval=4)
    with faults.armed("native.facts:delay=0.1 tensors.open:delay=0.1"):
        runs.train("b", save=background, save_interval=4, async_save=True)
    for iteration in (4, 8, 12, 16, 20):
        a, b = (native.read(recognise(root, iteration).directory) for root in (plain, background))
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        differing = {key for key in a.facts if a.facts[key] != b.facts[key]}
        assert differing == {"config"}  # --save and --async-save itself


def saver_of(runs: Runs, **changes: object):
    trainer = build_trainer(load(runs.flags(save=runs.root / "save", async_save=True, **changes)).config)
    checkpoints.start(trainer)
    stream = microbatches(trainer, make_datasets(trainer).train, 0)
    said: list[str] = []
    return Saver(trainer, said.append), lambda: train_step(trainer, step_batches(trainer, stream)), said


def test_steps_go_on_while_it_is_written(runs: Runs) -> None:
    saver, step, said = saver_of(runs, save_interval=2)
    with faults.armed("native.facts@1:delay=2"):
        step(), saver.after_step(0)
        step()
        began = time.monotonic()
        saver.after_step(0)
        step(), saver.after_step(0)
        assert time.monotonic() - began < 1.5 and saver.saved == 0
        step()
        saver.after_step(0)  # a second one waits for the first
        assert time.monotonic() - began > 1.5 and saver.saved == 2
        assert said == ["waiting for the checkpoint that is being written"]
        saver.finish()
    assert saver.saved == 4 and recognise(runs.root / "save").iteration == 4
    saver.close()


def test_what_is_good_is_known_though_a_save_ends_late(runs: Runs) -> None:
    """--keep-last-n-checkpoints 1 must not remove the one checkpoint that a message would name."""
    saver, step, _ = saver_of(runs, save_interval=1, keep_last_n_checkpoints=1)
    progress = saver._trainer.progress
    with faults.armed("native.facts@1:delay=0.5"):
        step(), saver.after_step(0)
        step(), saver.finite_step()
        assert (saver.saved, progress.good) == (0, 0)
        saver.after_step(0)
        assert (saver.saved, progress.good) == (1, 1)
        saver.finish()
    kept = sorted(path.name for path in (runs.root / "save").glob("iter_*"))
    assert kept == ["iter_0000001", "iter_0000002"] and progress.good == 1
    saver.close()


def test_closing_waits_and_says_a_failure(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    saver, step, said = saver_of(runs, save_interval=1)
    with faults.armed("native.facts:delay=0.3 commit.rename:enospc"):
        step(), saver.after_step(0)
        saver.close()
    assert said == ["waiting for the checkpoint that is being written"]
    assert "No space left on device" in caplog.text
    assert not list((runs.root / "save").glob("iter_*"))


def test_one_that_is_given_up_leaves_nothing(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it was at: tensors, or all else."""
    for place in ("native.facts:delay=0.5", "tensors.write@9:delay=0.5", "tensors.rename:delay=0.5"):
        saver, step, said = saver_of(runs, save_interval=1)
        with faults.armed(place):
            step(), saver.after_step(0)
            time.sleep(0.2)
            saver.give_up()
            saver.close()
        assert said == ["giving up the checkpoint that is being written"] and "given up" in caplog.text
        assert not list((runs.root / "save").glob("iter_*"))


@pytest.mark.parametrize("waiting", ["after_step", "finish", "close"])
def test_an_interrupted_wait_gives_it_up(runs: Runs, monkeypatch: pytest.MonkeyPatch, waiting: str) -> None:
    """Whatever the run was waiting for; closing waits until the thread has tidied up."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    saver, step, said = saver_of(runs, save_interval=1)
    with faults.armed("native.facts:delay=0.5"):
        step(), saver.after_step(0)
        step()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("megatron.train.saving.wait", interrupted)
            saver.after_step(0) if waiting == "after_step" else getattr(saver, waiting)()
        assert saver.writing == (waiting != "close")
        saver.close()
    assert (
        said
        == [f"{doing} the checkpoint that is being written" for doing in ("waiting for", "giving up")][
            : 1 if waiting == "close" else 2
        ]
    )
    assert not saver.writing and not list((runs.root / "save").glob("iter_*"))


def test_one_set_of_buffers_for_all_saves() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16).T}
    snapshot = Snapshot(tensors, CPU)
    first = snapshot.take(tensors)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    tensors["a"] += 1
    assert torch.equal(first["a"], torch.arange(4.0))
    second = snapshot.take(tensors)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
    assert torch.equal(second["a"], tensors["a"]) and torch.equal(second["b"], tensors["b"])


def test_too_little_memory_is_said_at_once() -> None:
    huge = torch.empty(1, dtype=torch.uint8).expand(1 << 61)
    with pytest.raises(ConfigError, match=r"--async-save holds a copy .* leave it out"):
        Snapshot({"huge": huge}, CPU)


@pytest.mark.parametrize("place", ["native.facts@2", "tensors.open@3", "commit.rename@2", "commit.replace_file@2"])
def test_killed_while_it_is_written(runs: Runs, place: str) -> None:
    """The run that is started again is, bit for bit, the one that was never killed."""
    whole = steps(runs.train("whole"))
    save, metrics = runs.root / "save", runs.root / "killed.jsonl"
    flags = {"save": save, "load": save, "save_interval": 4, "async_save": True}
    command = [sys.executable, str(SCRIPT), *runs.flags(metrics_file=metrics, **flags)]
    run = subprocess.run(command, env={**os.environ, "EE_LLM_FAULTS": f"{place}:die"}, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    newest = recognise(save).iteration
    assert newest in (4, 8)
    resumed = steps(runs.train("killed", **flags))
    assert [line["iteration"] for line in resumed] == list(range(newest + 1, 21))
    assert resumed == whole[newest:]
    assert not [
        path
        for path in save.iterdir()
        if "." in path.name.removesuffix(".yaml").removesuffix(".json").removesuffix(".txt")
    ]
    manifest.verify(save / "iter_0000020")


@pytest.mark.parametrize("signals", [2, 3])
def test_a_second_signal_gives_up_what_is_being_written(runs: Runs, tmp_path: Path, signals: int) -> None:
    """Written to its end it would take minutes; a third signal changes nothing."""
    save = runs.root / "save"
    flags = runs.flags(save=save, save_interval=1, async_save=True, train_iters=100000)
    faulty = {**os.environ, "EE_LLM_FAULTS": "tensors.write:delay=0.5"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        run = subprocess.Popen([sys.executable, str(SCRIPT), *flags], env=faulty, stdout=out, stderr=out)
    while not list(save.glob("iter_0000001.staging-*/tensors/*")):
        assert run.poll() is None, log.read_text()
        time.sleep(0.02)
    for _ in range(signals):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert run.wait(15) == 130, log.read_text()
    assert "giving up the checkpoint that is being written" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list(save.glob("iter_*"))
