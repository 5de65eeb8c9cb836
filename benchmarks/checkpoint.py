"""Saving and loading a run's state: time and memory against plain torch.distributed.checkpoint and `torch.save`.

Ours hashes, flushes and renames; plain DCP flushes; torch.save is given a flush, too. The ways take turns in one
process. Loads are timed twice: from the disk, as a run that starts meets it, and from the page cache, where the
hashes' own time shows. Memory is the peak of a fresh process for each way. Asynchronous
saves are measured in a training run: how long the loop waits, and what writing takes from the steps beside it.
Files go to the temporary directory (TMPDIR), which should be the disk in question.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from report import Figure, arguments, finish, ratios

from megatron.checkpoint import manifest, native
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.state import RunState
from megatron.config.load import load as load_config
from megatron.parallel.backend import Backend, peak_resident_bytes
from megatron.testing.corpus import training_flags, write_corpus
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.data import make_datasets, microbatches, step_batches
from megatron.train.saving import Saver
from megatron.train.step import train_step

WAYS = ("ours", "dcp", "torch.save")
Tensors = dict[str, torch.Tensor]


def make_state(quick: bool) -> Tensors:
    """Weights and moments of a GPT: about 0.9 GB, or 30 MB."""
    hidden, layers, vocab = (256, 8, 4096) if quick else (768, 10, 8192)
    shapes = {"embedding": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.qkv": (3 * hidden, hidden), f"layers.{layer}.proj": (hidden, hidden),
            f"layers.{layer}.up": (4 * hidden, hidden), f"layers.{layer}.down": (hidden, 4 * hidden),
            f"layers.{layer}.norm": (hidden,),
        }  # fmt: skip
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    return {f"{kind}/{name}": torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


def save(way: str, tensors: Tensors, root: Path) -> None:
    """Write to a new place below `root`, durably."""
    if way == "ours":
        native.save(root / "ours", 1, RunState(tensors))
    elif way == "dcp":
        dcp.save(tensors, checkpoint_id=root / "dcp", no_dist=True)
    else:
        with open(root / "state.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())


def load(way: str, into: Tensors, root: Path) -> None:
    """Fill `into`; ours verifies every hash before it copies a tensor, as `--load` does."""
    if way == "ours":
        directory = root / "ours" / "iter_0000001"
        manifest.verify(directory)
        native.load(directory, into)
    elif way == "dcp":
        dcp.load(into, checkpoint_id=root / "dcp", no_dist=True)
    else:
        for name, tensor in torch.load(root / "state.pt", weights_only=True).items():
            into[name].copy_(tensor)


def discard(way: str, root: Path) -> None:
    """Remove what `save` wrote."""
    shutil.rmtree(root / way, ignore_errors=True)
    (root / "state.pt").unlink(missing_ok=True)


def forget(root: Path) -> None:
    """Take the files below `root` out of the page cache, where the system can."""
    for path in root.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def timings(tensors: Tensors, root: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by what is done and way."""
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    done = {
        "save": lambda way: save(way, tensors, root),
        "load from the page cache": lambda way: load(way, into, root),
        "load from the disk": lambda way: load(way, into, root),
    }
    seconds: dict[str, dict[str, list[float]]] = {verb: {way: [] for way in WAYS} for verb in done}
    for number in range(rounds + 1):  # the first one warms up
        for way in WAYS:
            for verb, act in done.items():
                if verb == "load from the disk":
                    forget(root)
                begin = time.perf_counter()
                act(way)
                if number:
                    seconds[verb][way].append(time.perf_counter() - begin)
            discard(way, root)
    return seconds


def hashing(tensors: Tensors, rounds: int) -> list[float]:
    """Seconds of each round to hash what lies in memory, on all cores: what no load that verifies can do without."""
    parts = [memoryview(tensor.numpy()).cast("B") for tensor in tensors.values()]
    seconds = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in range(rounds + 1):
            begin = time.perf_counter()
            list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))
            if number:
                seconds.append(time.perf_counter() - begin)
    return seconds


class Run:
    """A training run that saves when it is told to."""

    def __init__(self, root: Path, asynchronous: bool, quick: bool) -> None:
        sizes = {"hidden_size": 128, "num_layers": 4} if quick else {"hidden_size": 512, "num_layers": 12}
        corpus = write_corpus(root / "corpus")
        flags = training_flags(
            corpus, root / "cache", save=root / f"async {asynchronous}".replace(" ", "-"), save_interval=1,
            async_save=asynchronous or None, seq_length=64, global_batch_size=2, train_iters=1000,
            num_attention_heads=8, attention_dropout=0, hidden_dropout=0, **sizes,
        )  # fmt: skip
        self.trainer = build_trainer(load_config(flags).config)
        checkpoints.start(self.trainer)
        self._stream = microbatches(self.trainer, make_datasets(self.trainer).train, 0)
        self.saver = Saver(self.trainer, lambda text: None)

    def step(self) -> float:
        """Seconds of a step."""
        begin = time.perf_counter()
        train_step(self.trainer, step_batches(self.trainer, self._stream))
        return time.perf_counter() - begin

    def save(self) -> float:
        """Seconds that the loop waits for a save."""
        begin = time.perf_counter()
        self.saver.after_step(0)
        return time.perf_counter() - begin

    def steps_beside_writing(self) -> tuple[int, float]:
        """How many steps were made until the writing ended, and their seconds."""
        seconds = []
        while self.saver.writing:
            seconds.append(self.step())
        return len(seconds), sum(seconds)


def asynchronous(root: Path, rounds: int, quick: bool) -> list[Figure]:
    """A save every few steps, waited for and not, in turns."""
    waited, unwaited = Run(root, False, quick), Run(root, True, quick)
    blocked, plain, added = {"sync": [], "async": []}, [], []
    for number in range(rounds + 1):
        plain_steps = [waited.step() for _ in range(3)]
        sync_seconds = waited.save()
        unwaited.step()
        async_seconds = unwaited.save()
        count, seconds = unwaited.steps_beside_writing()
        shutil.rmtree(waited.trainer.config.checkpoint.save)
        shutil.rmtree(unwaited.trainer.config.checkpoint.save)
        if number:
            blocked["sync"].append(sync_seconds)
            blocked["async"].append(async_seconds)
            plain.append(statistics.median(plain_steps))
            added.append(async_seconds + seconds - count * plain[-1])
    waited.saver.close()
    unwaited.saver.close()
    return [
        Figure.of("the loop waits for an asynchronous save / a synchronous one",
                  ratios(blocked["async"], blocked["sync"]), "x", 0.10, at_least=False),
        Figure.of("an asynchronous save adds to the run / a synchronous one", ratios(added, blocked["sync"]), "x"),
    ]  # fmt: skip


def measure_memory(way: str, quick: bool, root: Path) -> None:
    """Print how far a save raises this process's peak above its state, in bytes."""
    tensors = make_state(quick)
    before = peak_resident_bytes()
    if way == "async":
        Snapshot(tensors, Backend.choose("gloo")).take(tensors)
    else:
        save(way, tensors, root)
    size = sum(tensor.nbytes for tensor in tensors.values())
    sys.stdout.write(json.dumps({"raised": peak_resident_bytes() - before, "state": size}))


def memory(way: str, quick: bool, root: Path) -> float:
    """`measure_memory` in a fresh process, as a share of the state."""
    code = f"import pathlib, checkpoint; checkpoint.measure_memory({way!r}, {quick!r}, pathlib.Path({str(root)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    answer = json.loads(done.stdout)
    return answer["raised"] / answer["state"]


def figures_of(options: Namespace, root: Path) -> list[Figure]:
    """All of it."""
    tensors = make_state(options.quick)
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    figures = [Figure("state", megabytes, "MB")]
    rounds = 3 if options.quick else 9
    timed = timings(tensors, root, rounds)
    for verb, seconds in timed.items():
        figures += [Figure.of(f"{verb}, {way}", [megabytes / s for s in seconds[way]], "MB/s") for way in WAYS]
        ours = seconds["ours"]
        figures.append(Figure.of(f"{verb}: time / plain DCP", ratios(ours, seconds["dcp"]), "x", 1.3, False))
        figures.append(Figure.of(f"{verb}: time / torch.save", ratios(ours, seconds["torch.save"]), "x"))
    hashed, cached = hashing(tensors, rounds), timed["load from the page cache"]["dcp"]
    floor = [1 + both for both in ratios(hashed, cached)]
    figures.append(Figure.of("SHA-256 alone, on all cores", [megabytes / s for s in hashed], "MB/s"))
    figures.append(Figure.of("load from the page cache: (SHA-256 + plain DCP) / plain DCP, the floor", floor, "x"))
    del tensors
    figures += asynchronous(root, 3 if options.quick else 5, options.quick)
    for way in WAYS:
        figures.append(Figure(f"memory that a save takes / state, {way}", memory(way, options.quick, root), "x"))
        discard(way, root)
    limit = None if options.quick else 1.05  # of a small state, fixed costs are a large part
    figures.append(
        Figure("memory of --async-save / state", memory("async", options.quick, root), "x", limit, at_least=False)
    )
    return figures


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory() as root:
        return finish("checkpoint", figures_of(options, Path(root)), options)


if __name__ == "__main__":
    raise SystemExit(main())
