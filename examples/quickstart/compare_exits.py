"""Generates with the whole model and with early exits, on beginnings of texts that training never saw.

    python compare_exits.py --load CHECKPOINTS --text HELD_OUT.jsonl ... --output DIR

DIR gets table.txt, samples.txt and results.json; both texts are shown as well, samples coloured by exit.
"""

import argparse
import json
import os
import random
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.errors import DataError, EELLMError
from megatron.exits.spec import FINAL
from megatron.files import atomic_write
from megatron.inference.build import load_model
from megatron.inference.engine import Engine
from megatron.inference.measure import Comparison, as_table, compare_thresholds
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import Result, SamplingParams
from megatron.inference.text import TextStream

THRESHOLDS = (0.8, 0.6, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1)
PROMPT_TOKENS, NEW_TOKENS = 24, 96
SAMPLE_PROMPTS = ("Return a list of", "This module provides", "If the file", "The default value is", "def read(self, ")
SAMPLE_TOKENS, TEMPERATURE = 64, 0.8
WANTED_SPEED_UP, WANTED_AGREEMENT, WANTED_DISTINCT = 1.3, 0.95, 0.5
COLOURS = ("33", "36", "35", "32")  # of the exits, shallow first; the whole model keeps the terminal's own


def beginnings(files: Sequence[Path], engine: Engine, count: int) -> list[list[int]]:
    """Prompts from `count` documents of each file, always the same: the first tokens of a paragraph."""
    prompts = []
    for path in files:
        draw = random.Random(path.name)
        try:
            with open(path, encoding="utf-8") as lines:
                texts = [json.loads(line)["text"] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f'--text {path} is no file of lines {{"text": ...}}: {error}') from error
        found = list(_paragraph_ids(texts, engine, draw))
        prompts += draw.sample(found, min(count, len(found)))
    if not prompts:
        raise DataError(f"no paragraph of {PROMPT_TOKENS} tokens in {', '.join(map(str, files))}")
    return prompts


def _paragraph_ids(texts: Sequence[str], engine: Engine, draw: random.Random) -> Iterator[list[int]]:
    """One beginning for each text that has a paragraph long enough."""
    for text in texts:
        long_ones = [p for p in text.split("\n\n") if len(p) > 8 * PROMPT_TOKENS]
        if long_ones:
            yield engine.tokenizer.tokenize(draw.choice(long_ones))[:PROMPT_TOKENS]


def best_row(rows: Sequence[Comparison]) -> Comparison | None:
    """The fastest threshold among those that agree well enough with the whole model."""
    good = [row for row in rows if row.threshold is not None and row.agreement >= WANTED_AGREEMENT]
    return max(good, key=lambda row: row.speed_up, default=None)


def verdict(rows: Sequence[Comparison]) -> str:
    """What the table says, in a sentence or two, also where it says that exits bring little."""
    best = best_row(rows)
    if best is not None and best.speed_up >= WANTED_SPEED_UP:
        return (
            f"At threshold {best.threshold:g} early exits generate {best.speed_up:.2f} times as fast, and "
            f"{best.agreement:.1%} of their tokens are the ones that the full model would have chosen."
        )
    missed = f"No threshold is {WANTED_SPEED_UP}x as fast with {WANTED_AGREEMENT:.0%} agreement in this run"
    if best is not None:
        missed += f": the nearest is {best.threshold:g} with {best.speed_up:.2f}x at {best.agreement:.1%}"
    return f"{missed}. A longer training (MINUTES=20), or a machine with less to do beside it, makes exits surer."


def distinct_3(results: Sequence[Result]) -> float:
    """Share of different ones among all runs of three tokens: 1 never repeats itself, blanks or loops are near 0."""
    triples = [triple for result in results for triple in zip(result.ids, result.ids[1:], result.ids[2:], strict=False)]
    return len(set(triples)) / max(1, len(triples))


def sample(engine: Engine, threshold: float | None, max_new_tokens: int) -> list[Result]:
    """A continuation of each sample prompt at the given threshold (None: the full model)."""
    policy = None if threshold is None else ConfidencePolicy(threshold)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=TEMPERATURE, seed=7)
    return [engine.generate(engine.tokenizer.tokenize(prompt), params, policy) for prompt in SAMPLE_PROMPTS]


def show(engine: Engine, results: Sequence[Result], title: str, colour: bool) -> str:
    """Prompts and continuations as indented text."""
    lines = [f"{title}, temperature {TEMPERATURE}; distinct-3: {distinct_3(results):.2f}", ""]
    for prompt, result in zip(SAMPLE_PROMPTS, results, strict=True):
        text = _bold(prompt) if colour else prompt
        text += _coloured(engine, result) if colour else result.text
        lines += [textwrap.indent(text.rstrip(), "    | ", lambda _: True), ""]
    return "\n".join(lines)


def _coloured(engine: Engine, result: Result) -> str:
    heads = engine.model.head_labels()
    colours = {head: "0" if head == FINAL else COLOURS[i % len(COLOURS)] for i, head in enumerate(heads)}
    decoder, parts = TextStream(engine.tokenizer), []
    for token in result.tokens:
        part = decoder.push(token.id) if token.id != engine.tokenizer.eod else ""
        parts.append("\n".join(f"\033[{colours[token.exit]}m{line}\033[0m" for line in part.split("\n")))
    return "".join(parts) + decoder.finish()


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m"


def table(engine: Engine, prompts: Sequence[Sequence[int]], repeats: int) -> list[Comparison]:
    """The comparison, with a progress bar on a terminal."""
    with tqdm(desc="Generated", unit=" texts", leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return compare_thresholds(engine, prompts, THRESHOLDS, NEW_TOKENS, repeats, on_progress=progress)


def run(options: argparse.Namespace) -> None:
    """Load, compare, sample, write."""
    model, tokenizer, config = load_model(options.load, dtype="float32" if not torch.cuda.is_available() else None)
    if config.model.hidden_size < 512:
        torch.set_num_threads(1)  # one row times a small matrix: threads would wait for one another
    engine = Engine(model, tokenizer)
    rows = table(engine, beginnings(options.text, engine, options.prompts), options.repeats)
    text = f"{as_table(rows)}\n\n{textwrap.fill(verdict(rows), 100)}\n"
    sys.stdout.write(text + "\n")

    best = best_row(rows)
    threshold = best.threshold if best is not None else 0.8
    room = config.model.max_positions - max(len(tokenizer.tokenize(prompt)) for prompt in SAMPLE_PROMPTS)
    samples = {t: sample(engine, t, min(SAMPLE_TOKENS, room)) for t in (None, threshold)}
    titles = {None: "Full model", threshold: f"Early exits at threshold {threshold:g}"}
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for t, results in samples.items():
        sys.stdout.write(show(engine, results, titles[t], colour) + "\n")
    distinct = {titles[t]: distinct_3(results) for t, results in samples.items()}
    if min(distinct.values()) < WANTED_DISTINCT:
        sys.stdout.write(f"These samples repeat themselves (distinct-3 below {WANTED_DISTINCT}): train longer.\n")

    plain = "\n".join(show(engine, results, titles[t], False) for t, results in samples.items())
    about = {"rows": [asdict(row) for row in rows], "distinct_3": distinct, "best": best and asdict(best)}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, content in (("table.txt", text), ("samples.txt", plain), ("results.json", json.dumps(about, indent=2))):
        with atomic_write(str(options.output / name)) as file:
            file.write(content.encode())


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR", help="checkpoints of a model with exits")
    parser.add_argument("--text", required=True, nargs="+", type=Path, metavar="FILE", help="JSON lines to take from")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=12, help="texts from each file (default: 12)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of measuring (default: 3)")
    options = parser.parse_args()
    try:
        run(options)
    except EELLMError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
