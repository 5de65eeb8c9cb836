"""`tools/train_tokenizer.py`: a byte-level BPE vocabulary learnt from one's own text."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.cli.guard import run_guarded
from megatron.cli.reading_progress import ReadingProgress
from megatron.data.text_files import BadRecord, check_keys, find_inputs, input_size, read_batches
from megatron.errors import DataError, StorageError
from megatron.files import atomic_write
from megatron.tokenizer.gpt2 import END_OF_TEXT
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        allow_abbrev=False,
        description="Train a byte-level BPE tokenizer. Use it with --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model DIR.",
    )
    result.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="Files, directories or globs: JSON lines (.jsonl, .json, also .gz), .txt, .parquet.",
    )  # fmt: skip
    result.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="Keys (Parquet: columns) that hold text (default: text).",
    )  # fmt: skip
    result.add_argument("--vocab-size", type=int, required=True, help="Entries, special tokens included.")
    result.add_argument(
        "--output", required=True, metavar="DIR",
        help="Gets tokenizer.json and tokenizer_config.json; with --no-merge-whitespace also GPT-2's vocab.json "
        "and merges.txt.",
    )  # fmt: skip
    result.add_argument(
        "--merge-whitespace", action=argparse.BooleanOptionalAction, default=True,
        help="Let a line break and the indentation after it become one token (default: yes).",
    )  # fmt: skip
    result.add_argument(
        "--special-tokens", nargs="+", default=[END_OF_TEXT], metavar="TOKEN",
        help=f"The first one separates documents (default: {END_OF_TEXT}).",
    )  # fmt: skip
    result.add_argument(
        "--min-frequency", type=int, default=2, metavar="N", help="Merge pairs that occur N times (default: 2)."
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parser().parse_args(argv)
    return run_guarded(lambda: _run(args), "interrupted; nothing was written")


def _run(args: argparse.Namespace) -> None:
    inputs = find_inputs(args.input)
    check_keys(inputs, args.json_keys)
    with ReadingProgress(input_size(inputs), verb="Read") as progress:
        tokenizer = train_byte_level_bpe(
            _texts(inputs, args.json_keys, progress),
            args.vocab_size,
            merge_whitespace=args.merge_whitespace,
            special_tokens=args.special_tokens,
            min_frequency=args.min_frequency,
            show_progress=sys.stderr.isatty(),
        )
    if not progress.documents:
        raise DataError(f"--input holds no document ({progress.num_bad} unreadable records); nothing was written")
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        sys.stderr.write(
            f"warning: the text gives {size:,} entries only (no other pair occurs {args.min_frequency} times), "
            f"--vocab-size asked for {args.vocab_size:,}\n"
        )
    output = Path(args.output)
    files = _save(tokenizer_files(tokenizer, args.special_tokens[0]), output)
    for name in ("vocab.json", "merges.txt"):
        if output / name not in files and (output / name).exists():
            sys.stderr.write(f"warning: {output / name} is of an earlier training, with another vocabulary\n")
    sys.stdout.write(
        f"{size:,} entries from {progress.documents:,} documents, {progress.num_bad:,} unreadable records "
        f"skipped; wrote {' '.join(map(str, files))}\n"
    )


def _save(contents: dict[str, str], directory: Path) -> list[Path]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with atomic_write(str(directory / name)) as file:
                file.write(content.encode("utf-8"))
    except OSError as err:
        raise StorageError(f"cannot write {err.filename or directory}: {err.strerror}") from err
    return [directory / name for name in contents]


def _texts(inputs: Sequence[Path], keys: Sequence[str], progress: ReadingProgress) -> Iterator[str]:
    for batch in read_batches(inputs, keys):
        documents = 0
        bad: list[BadRecord] = []
        for document in batch.documents(keys):
            if isinstance(document, BadRecord):
                bad.append(document)
                continue
            documents += 1
            for text in document.texts.values():
                yield from [text] if isinstance(text, str) else text
        progress.update(documents, batch.consumed, bad)
