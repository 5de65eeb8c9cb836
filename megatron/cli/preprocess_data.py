"""`tools/preprocess_data.py`: documents to the `.bin/.idx` files that training reads."""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron.cli.guard import run_guarded
from megatron.cli.reading_progress import ReadingProgress
from megatron.config.data import TOKENIZER_TYPES, TokenizerConfig
from megatron.data.preprocess import Encoded, EncodeSettings, PreprocessSettings, Summary, preprocess
from megatron.data.text_files import find_inputs, input_size


def parser() -> argparse.ArgumentParser:
    """The command line; flags named as Megatron-LM names them."""
    result = argparse.ArgumentParser(
        prog="preprocess_data.py",
        allow_abbrev=False,
        description="Tokenize documents into PREFIX_KEY_document.bin/.idx; "
        "give PREFIX_KEY_document as --data-path to train on them.",
    )
    group = result.add_argument_group("input")
    group.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="Files, directories or globs: JSON lines (.jsonl, .json, also .gz), .txt (one document a file), "
        ".parquet.",
    )  # fmt: skip
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="Keys (Parquet: columns) to extract, one dataset each (default: text).",
    )  # fmt: skip
    group.add_argument("--split-sentences", action="store_true", help="One sequence a sentence (needs nltk).")
    group.add_argument("--keep-newlines", action="store_true", help="Keep the space between sentences when splitting.")
    group.add_argument("--lang", default="english", help="Language of the sentence splitter (default: english).")
    group.add_argument(
        "--strict", action="store_true", help="Stop at the first unreadable record instead of skipping it."
    )
    group = result.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, help=f"One of {', '.join(TOKENIZER_TYPES)}.")
    group.add_argument(
        "--tokenizer-model", help="SentencePiece model, tokenizer.json, or Hugging Face tokenizer directory."
    )
    group.add_argument("--vocab-file", help="vocab.json of a GPT-2 BPE.")
    group.add_argument("--merge-file", help="merges.txt of a GPT-2 BPE.")
    group.add_argument("--vocab-size", type=int, default=786, help="Vocabulary of NullTokenizer (default: 786).")
    group.add_argument(
        "--append-eod", action="store_true", help="End every document that isn't empty with the separator token."
    )
    group = result.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="Path without an ending.")
    group = result.add_argument_group("runtime")
    group.add_argument(
        "--workers", type=int, help="Tokenizing processes, a multiple of --partitions (default: one per core)."
    )
    group.add_argument(
        "--partitions", type=int, default=1,
        help="Deal documents out to this many parts in turn; the parts follow one another in the output.",
    )  # fmt: skip
    group.add_argument(
        "--keep-sequential-samples", action="store_true",
        help="With --partitions: keep the documents in the order of the input.",
    )  # fmt: skip
    group.add_argument(
        "--log-interval", type=int, default=1000, metavar="N", help="Documents between reports (default: 1000)."
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parser().parse_args(argv)
    return run_guarded(lambda: _run(args), "interrupted; nothing was written")


def _run(args: argparse.Namespace) -> None:
    inputs = find_inputs(args.input)
    settings = PreprocessSettings(
        inputs=tuple(inputs),
        output_prefix=args.output_prefix,
        encode=EncodeSettings(
            tokenizer=TokenizerConfig(
                tokenizer_type=args.tokenizer_type,
                tokenizer_model=args.tokenizer_model,
                vocab_file=args.vocab_file,
                merge_file=args.merge_file,
                vocab_size=args.vocab_size,
            ),
            keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            split_sentences=args.split_sentences,
            keep_newlines=args.keep_newlines,
            language=args.lang,
        ),
        workers=_default_workers(args.partitions) if args.workers is None else args.workers,
        partitions=args.partitions,
        keep_sequential_samples=args.keep_sequential_samples,
        strict=args.strict,
    )
    with ReadingProgress(input_size(inputs), max(1, args.log_interval)) as progress:

        def on_batch(result: Encoded) -> None:
            progress.update(result.documents, result.consumed, result.bad)

        summary = preprocess(settings, on_batch)
        speed = progress.megabytes_per_second()
    sys.stdout.write(_summary_line(summary, speed) + "\n")


def _default_workers(partitions: int) -> int:
    """One per core this process may use, rounded to the multiple of `partitions` that is asked for."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(partitions, cores - cores % max(1, partitions))


def _summary_line(summary: Summary, megabytes_per_second: float) -> str:
    return (
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, {megabytes_per_second:.2f} MB/s, "
        f"{summary.skipped:,} unreadable records skipped; wrote {' '.join(summary.files)}"
    )
