"""Tokenizing documents: tokens/s against Hugging Face `datasets.map`, and memory on a large file.

The same JSON lines, byte-level BPE and number of processes (one per core). Ours is the whole command, from start to
Megatron's `.bin/.idx`; `map` alone starts in a running process, with the text already in Arrow, and writes Arrow. The
two take turns. Memory is watched from outside while the tool runs on a small file and on one ten times as large.
"""

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from report import Figure, arguments, finish, ratios

from megatron.cli.train_tokenizer import main as train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30


def words(count: int) -> tuple[list[str], list[float]]:
    """An invented vocabulary, and how often each word or a more frequent one comes: Zipf's law."""
    draw = random.Random(1)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ion")]
    vocabulary = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3, 3, 4)))) for _ in range(count)]
    return vocabulary, list(accumulate(1 / (rank + 3) for rank in range(count)))


def write_corpus(path: Path, size: int) -> None:
    """JSON lines of about `size` bytes: documents of 50 to 1,500 words in sentences."""
    draw = random.Random(2)
    vocabulary, reach = words(30_000)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            sentences = [
                " ".join(draw.choices(vocabulary, cum_weights=reach, k=draw.randint(4, 25))).capitalize()
                for _ in range(draw.randint(4, 100))
            ]
            file.write(json.dumps({"text": ". ".join(sentences) + "."}) + "\n")


def command(corpus: Path, tokenizer: Path, out: Path, workers: int) -> list[str]:
    """The tool, as users call it."""
    return [
        sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), "--output-prefix",
        str(out / "ours"), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer),
        "--workers", str(workers),
    ]  # fmt: skip


def ours(corpus: Path, tokenizer: Path, out: Path, workers: int) -> int:
    """Tokens written."""
    done = subprocess.run(
        command(corpus, tokenizer, out, workers),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return int(re.search(r"([\d,]+) tokens", done.stdout)[1].replace(",", ""))


def theirs(corpus: Path, tokenizer: Path, out: Path, workers: int) -> tuple[int, float, float]:
    """Tokens written; seconds of reading into Arrow, and of `map`."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    encode = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    cache = tempfile.mkdtemp(dir=out)
    begin = time.perf_counter()
    texts = load_dataset("json", data_files=str(corpus), split="train", cache_dir=cache)
    middle = time.perf_counter()
    done = texts.map(
        lambda batch: {"ids": encode(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True, num_proc=workers, remove_columns=["text"],
    )  # fmt: skip
    end = time.perf_counter()
    return sum(len(ids) for ids in done["ids"]), middle - begin, end - middle


def speed(corpus: Path, tokenizer: Path, out: Path, rounds: int, workers: int) -> list[Figure]:
    """Both in turns."""
    try:
        import datasets
        import transformers
    except ImportError:
        return [Figure("tokens/s / datasets.map (pip install datasets transformers)", None, "x", 1.0)]
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as ours, each on one core
    mine: list[float] = []
    reading: list[float] = []
    mapping: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        tokens = ours(corpus, tokenizer, out, workers)
        mine.append(time.perf_counter() - begin)
        same, seconds, map_seconds = theirs(corpus, tokenizer, out, workers)
        if same != tokens:
            raise AssertionError(f"{tokens:,} tokens here, {same:,} there")
        reading.append(seconds)
        mapping.append(map_seconds)
    whole = [a + b for a, b in zip(reading, mapping, strict=True)]
    return [
        Figure.of(f"tokens/s, {workers} workers", [tokens / seconds for seconds in mine]),
        Figure.of("tokens/s, datasets.map alone", [tokens / seconds for seconds in mapping]),
        Figure.of("tokens/s / datasets.map alone", ratios(mapping, mine), "x", 1.0),
        Figure.of("tokens/s / datasets, reading and map", ratios(whole, mine), "x"),
    ]


def peak_memory(corpus: Path, tokenizer: Path, out: Path, workers: int) -> float:
    """Most bytes that any process of the tool held resident."""
    run = subprocess.Popen(
        command(corpus, tokenizer, out, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    while run.poll() is None:
        peak = max([peak, *(resident_peak(process) for process in family(run.pid))])
        time.sleep(0.1)
    if run.returncode:
        raise RuntimeError(f"preprocess_data.py ended with {run.returncode}")
    return peak


def family(process: int) -> Iterator[int]:
    """A process and all below it (Linux)."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in found:
            yield from family(int(child))


def resident_peak(process: int) -> int:
    """VmHWM in bytes; 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def memory(root: Path, tokenizer: Path, size: int, workers: int) -> list[Figure]:
    """Peaks on a tenth of `size` and on `size`."""
    name = f"of a process at {size / 1e6:,.0f} MB of text"
    if not Path("/proc/self/status").exists():
        return [Figure(f"peak memory {name}", None, "GiB", 1.0, at_least=False)]
    peaks = []
    for bytes_of_text in (size // 10, size):
        corpus = root / "large.jsonl"
        write_corpus(corpus, bytes_of_text)
        peaks.append(peak_memory(corpus, tokenizer, root, workers))
    return [
        Figure(f"peak memory {name}", peaks[1] / GIB, "GiB", 1.0, at_least=False),
        Figure("peak memory, ten times the text", peaks[1] / peaks[0], "x", 1.1, at_least=False),
    ]


def figures_of(options: Namespace, root: Path) -> list[Figure]:
    """All of it."""
    workers = multiprocessing.cpu_count()
    sample, corpus, tokenizer = root / "sample.jsonl", root / "corpus.jsonl", root / "tokenizer"
    write_corpus(sample, 2_000_000)
    write_corpus(corpus, 5_000_000 if options.quick else 60_000_000)
    vocabulary = "4000" if options.quick else "16000"
    train_tokenizer(["--input", str(sample), "--vocab-size", vocabulary, "--output", str(tokenizer)])
    figures = speed(corpus, tokenizer, root, 1 if options.quick else 5, workers)
    return figures + memory(root, tokenizer, 10_000_000 if options.quick else 1_000_000_000, workers)


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as root:
        return finish("preprocess", figures_of(options, Path(root)), options)


if __name__ == "__main__":
    raise SystemExit(main())
