"""SIGTERM and SIGINT: the first ends a run with a checkpoint at its step's border and exit code 0, a second at once.

Each run is a process of its own, which sends itself the signals at exact moments: nothing here waits or races.
"""

import functools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from megatron import faults
from megatron.checkpoint.dcp_files import Reader
from megatron.checkpoint.find import iterations, recognise_if_any
from megatron.data import loader
from megatron.data.gpt import GPTDataset
from megatron.model.stage import Stage
from megatron.nn.layer import TransformerLayer
from megatron.optim.optimizer import TrainingOptimizer
from megatron.train import evaluate, loop
from megatron.train.status import Status
from tests.unit.train.conftest import Runs, steps
from tests.unit.train.test_resume import assert_same_end

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "pretrain_early_exit_gpt.py"
LENGTH, INTERVAL = 8, 3  # iterations of a run, and from one checkpoint to the next
T, I = "SIGTERM", "SIGINT"
SIGNALS = [[T], [I], [T, T], [T, I], [I, T], [I, I]]

# Where a run comes by, beside the fault points of a save. The model has 4 layers; a step 4 microbatches of 2 samples.
PLACES = {
    "load": (Reader, "read_data"),
    "status": (Status, "__init__"),
    "build": (loop, "make_datasets"),
    "reader": (loader, "_leave_signals_to_the_trainer"),
    "read": (GPTDataset, "__getitem__"),
    "layer": (TransformerLayer, "forward"),
    "backward": (Stage, "backward"),
    "update": (TrainingOptimizer, "step"),
    "evaluate": (evaluate, "_forward"),
}


@dataclass(frozen=True)
class Moment:
    """Signals come as the run passes `first` and `second`; PLACE@N is the Nth passing of a place.

    kept: the newest checkpoint where only the first comes (None: that of some step's border), cut: where both do.
    before: iteration that an earlier run left under --save. reason: why the run ends, if not for the signal.
    """

    first: str
    second: str
    kept: int | None
    cut: int
    flags: dict[str, object] = field(default_factory=dict)
    to_group: bool = False
    before: int | None = None
    reason: str | None = None


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
KEEP_ONE = {"save_interval": 2, "keep_last_n_checkpoints": 1}
READERS, VALIDATION, ASYNC = {"num_workers": 2}, {"eval_interval": 4, "eval_iters": 2}, {"async_save": True}
MOMENTS = {
    "before the loop": Moment("status@1", "layer@1", 1, 0),
    "building the data": Moment("build@1", "layer@1", 1, 0),
    "reading": Moment("read@35", "read@36", 5, 3),
    "forward": Moment("layer@70", "layer@71", 5, 3),
    "forward of the last step": Moment("layer@118", "layer@119", 8, 6),
    "forward, to the readers too": Moment("layer@70", "layer@71", 5, 3, READERS, to_group=True),
    "backward": Moment("backward@18", "backward@19", 5, 3),
    "recomputing in backward": Moment("layer@134", "layer@135", 5, 3, RECOMPUTE),
    "update, then its save": Moment("update@5", "native.facts@2", 5, 3),
    "save": Moment("native.facts@2", "commit.rename@2", 6, 3),
    "save, while threads write": Moment("tensors.open@3", "tensors.open@4", 6, 3),
    "save over an old one": Moment("commit.move_aside@1", "commit.rename@1", 3, 3, before=3),
    "save, with its tracker": Moment("commit.rename@2", "file.rename@4", 6, 6),
    "save, pruning": Moment("commit.remove@1", "commit.empty@1", 6, 6, KEEP_ONE),
    "save beside training": Moment("native.facts@1", "tensors.open@1", None, 0, ASYNC),
    "forward, then its save by a thread": Moment("layer@70", "native.facts@2", 5, 3, ASYNC),
    "validation": Moment("evaluate@3", "layer@74", 4, 3, VALIDATION),
    "validation, to the readers too": Moment("evaluate@3", "layer@74", 4, 3, VALIDATION | READERS, to_group=True),
    "final test": Moment("evaluate@11", "layer@170", 8, 8, {"eval_iters": 2}, reason="finished"),
}


class Sender:
    """Sends this process, or its whole group, signals: `plan` says which one at which PLACE@N ("hang": its readers)."""

    def __init__(self, plan: dict[str, str], to_group: bool) -> None:
        self._plan, self._to_group = plan, to_group
        self._passed: Counter[str] = Counter()

    def point(self, place: str) -> None:
        """Pass a place."""
        self._passed[place] += 1
        word = self._plan.get(f"{place}@{self._passed[place]}")
        if word == "hang":
            for reader in multiprocessing.active_children():
                os.kill(reader.pid, signal.SIGSTOP)
        elif word:
            number = signal.Signals[word]
            os.killpg(0, number) if self._to_group else os.kill(os.getpid(), number)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.3)  # the main thread handles it before this one goes on

    def watch(self, owner: type | ModuleType, name: str, place: str) -> None:
        """Every call of that function passes `place` first."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: object, **kwargs: object) -> object:
            self.point(place)
            return function(*args, **kwargs)

        setattr(owner, name, watched)


def nursery() -> None:
    """Start a run for each line of standard input, one after the other, and answer with its process and exit code.

    Torch is imported once for all of them; otherwise they start and end as from the command line.
    """
    import torch._dynamo  # noqa: F401 - what a run imports late

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return run(**json.loads(line))
        sys.stdout.write(f"{child} {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def run(argv: list[str], log: str, **plan: object) -> None:
    """What the process of a run executes."""
    os.setsid()
    signal.alarm(60)  # a run that hangs ends, and fails its test
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sender = Sender(**plan)
    faults.point = sender.point
    for place, (owner, name) in PLACES.items():
        sender.watch(owner, name, place)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Signalled(Runs):
    """Runs that get signals, and the one that gets none."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.whole = root / "whole"
        self.lines = steps(self.train("whole", train_iters=LENGTH, save=self.whole, save_interval=INTERVAL))
        command = [sys.executable, "-c", f"from {__name__} import nursery; nursery()"]
        self._nursery = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self._nursery.stdin.close()
        assert self._nursery.wait(60) == 0

    def signalled(self, name: str, moment: Moment, signals: list[str], **changes: object) -> tuple[int, str]:
        """Exit code and output of a run that gets `signals`. No process of it is left, nor a traceback."""
        log = self.root / f"{name}.log"
        argv = self.flags(metrics_file=self.root / f"{name}.jsonl", **changes)
        plan = dict(zip((moment.first, moment.second), signals, strict=False))
        order = {"argv": argv, "log": str(log), "plan": plan, "to_group": moment.to_group}
        self._nursery.stdin.write(json.dumps(order) + "\n")
        self._nursery.stdin.flush()
        group, code = map(int, self._nursery.stdout.readline().split())
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
        out = log.read_text()
        assert "Traceback" not in out
        return code, out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signalled]:
    runs = Signalled(tmp_path_factory.mktemp("signals"))
    yield runs
    runs.close()


def check(runs: Signalled, where: str, signals: list[str]) -> None:
    """How the run ends, what it leaves, and that the one which goes on from there is the one that got no signal."""
    moment = MOMENTS[where]
    name = re.sub(r"\W+", "_", " ".join((where, *signals)))
    save, metrics = runs.root / name, runs.root / f"{name}.jsonl"
    flags = {"train_iters": LENGTH, "save": save, "save_interval": INTERVAL} | moment.flags
    if moment.before:
        directory = recognise_if_any(runs.whole, moment.before).directory
        shutil.copytree(directory, save / directory.name)
    code, out = runs.signalled(name, moment, signals, **flags)

    done = steps([json.loads(line) for line in metrics.read_text().splitlines()])
    assert done == runs.lines[: len(done)]
    status = json.loads((save / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("ended", code)
    found = recognise_if_any(save)
    newest = found.iteration if found else 0
    if len(signals) == 1:
        assert code == 0, out
        assert status["reason"] == (moment.reason or f"{signals[0]} received")
        assert newest == len(done) == status["iteration"] and moment.kept in (newest, None)
        assert ("evaluation given up" in out) == moment.first.startswith("evaluate")
        assert tidy(save)
    else:
        assert code == 130 and out.endswith("interrupted\n"), out
        assert status["reason"] == f"KeyboardInterrupt: second signal ({signals[1]})"
        assert newest == moment.cut and status["iteration"] - len(done) in (0, 1)
    assert set(iterations(save)) - set(range(0, LENGTH, flags["save_interval"])) <= {newest}

    assert steps(runs.train(name, load=save, **flags)) == runs.lines[newest:]
    assert_same_end(save, runs.whole)
    assert tidy(save)


def tidy(save: Path) -> bool:
    """Whether only whole things lie there."""
    names = r"iter_\d{7}|config\.yaml|run_status\.json|latest_checkpointed_iteration\.txt"
    return all(re.fullmatch(names, path.name) for path in save.iterdir())


QUICK = [
    ("forward", [I]), ("save", [I, T]), ("save beside training", [T]), ("validation, to the readers too", [T]),
    ("forward, to the readers too", [I, I]), ("forward, then its save by a thread", [T, I]), ("before the loop", [T]),
]  # fmt: skip


def cases() -> Iterator[object]:
    """Every moment with every order of signals; few of them are quick."""
    for where in MOMENTS:
        for signals in SIGNALS:
            marks = [] if (where, signals) in QUICK else [pytest.mark.slow]
            yield pytest.param(where, signals, marks=marks, id=f"{where}-{'+'.join(signals)}")


@pytest.mark.parametrize(("where", "signals"), cases())
def test_signals(runs: Signalled, where: str, signals: list[str]) -> None:
    check(runs, where, signals)


def test_no_further_batch_is_evaluated(runs: Signalled) -> None:
    """The second signal waits for one, and so never comes."""
    flags = {"train_iters": LENGTH, **VALIDATION}
    assert runs.signalled("batches", Moment("evaluate@3", "evaluate@4", 4, 0), [T, T], **flags)[0] == 0


@pytest.mark.parametrize(("word", "expected"), [(T, 143), (I, 130)])
def test_a_signal_while_a_checkpoint_is_loaded(runs: Signalled, word: str, expected: int) -> None:
    """There is nothing to save yet; and the checkpoint isn't damaged."""
    flags = {"load": runs.whole, "train_iters": LENGTH}
    code, out = runs.signalled(f"load_{word}", Moment("load@1", "", 0, 0), [word], **flags)
    assert code == expected and out.endswith("interrupted\n") and "damaged" not in out


@pytest.mark.parametrize("word", [T, I])
def test_a_signal_to_the_group_as_a_reader_starts(runs: Signalled, word: str) -> None:
    moment = Moment("reader@1", "", 1, 0, to_group=True)
    code, out = runs.signalled(f"reader_{word}", moment, [word], train_iters=LENGTH, num_workers=1)
    assert code == 0 and f"stopping after iteration 1: {word} received" in out


@pytest.mark.parametrize("word", [T, I])
def test_a_signal_as_the_run_ends_changes_nothing(runs: Signalled, word: str) -> None:
    """It comes just before run_status.json is replaced: after one at the start, and a tracker and a config a save."""
    save = runs.root / f"end_{word}"
    flags = {"train_iters": LENGTH, "save": save, "save_interval": INTERVAL}
    code, _ = runs.signalled(save.name, Moment("file.rename@8", "", 8, 8), [word], **flags)
    status = json.loads((save / "run_status.json").read_text())
    assert (code, status["state"], status["reason"]) == (0, "ended", "finished")


@pytest.mark.slow
def test_a_reader_that_hangs_does_not_keep_the_run_from_ending(runs: Signalled) -> None:
    flags = {"train_iters": LENGTH, "num_workers": 1}
    code, out = runs.signalled("stuck", Moment("layer@70", "layer@71", 5, 5), [T, "hang"], **flags)
    assert code == 0 and "stopping after iteration 5" in out


@pytest.mark.slow
@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("signals", SIGNALS, ids="+".join)
def test_evaluation_alone_is_given_up_and_changes_nothing(runs: Signalled, signals: list[str], readers: int) -> None:
    files = {path: path.stat().st_mtime_ns for path in runs.whole.rglob("*")}
    moment = Moment("evaluate@3", "layer@10", None, 0, to_group=True)
    flags = {"load": runs.whole, "save": runs.whole, "skip_train": True, "eval_iters": 2, "num_workers": readers}
    code, out = runs.signalled(f"evaluation_{readers}_{'_'.join(signals)}", moment, signals, **flags)
    assert code == (0 if len(signals) == 1 else 130)
    assert ("valid evaluation given up" in out) == (len(signals) == 1) and "loss:" not in out
    assert {path: path.stat().st_mtime_ns for path in runs.whole.rglob("*")} == files
