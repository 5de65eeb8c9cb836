"""`tools/checkpoint/util.py`: Megatron-LM's flags for changing layouts and importing models, on the same converter."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.convert.convert import Conversion
from megatron.cli.conversion import run
from megatron.cli.convert_checkpoint import add_layout, add_places, iteration_asked, layout_asked
from megatron.cli.guard import run_guarded
from megatron.errors import ConfigError, DataError
from megatron.files import read_small

_LOADERS = {"megatron": "megatron", "native": "native", "hf": "hf", "llama2_hf": "hf"}
_LARGEST_VOCABULARY = 256 << 20  # bytes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="util.py",
        allow_abbrev=False,
        description="Change the tensor- and pipeline-parallel layout of a checkpoint in Megatron's format, or bring a "
        "model into it. checkpoint_converter.py does that and more.",
    )
    result.add_argument(
        "--model-type",
        choices=("GPT", "EarlyExitGPT", "BERT"),
        required=True,
        help="Either GPT; what it is, its files say.",
    )
    result.add_argument("--loader", choices=_LOADERS, default="megatron", help="Format to read (default: megatron).")
    result.add_argument(
        "--saver", choices=("megatron", "native", "hf"), default="megatron", help="Format to write (default: megatron)."
    )
    add_places(result)
    add_layout(result)
    result.add_argument(
        "--target-exit-position", choices=("ignore", "pre", "post"), default="ignore",
        help="Move exits to the input or output of layers (default: ignore, which leaves them).",
    )  # fmt: skip
    result.add_argument("--true-vocab-size", type=int, metavar="N", help="Ids of the tokenizer; more rows are padding.")
    result.add_argument("--vocab-file", type=Path, metavar="FILE", help="A vocabulary in JSON, for their number.")
    result.add_argument("--tokenizer-model", metavar="FILE", help="Of llama2_hf: its SentencePiece model.")
    result.add_argument("--no-checking", action="store_true", help="Don't read the target back.")
    result.add_argument(
        "--max-queue-size", type=int, default=50, metavar="N", help="Accepted without effect: there is no queue."
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parser().parse_args(argv)
    return run_guarded(lambda: run(_job(args)), "interrupted; nothing was written")


def _job(args: argparse.Namespace) -> Conversion:
    """What the flags ask for. Raises ConfigError where that can't be."""
    if args.model_type == "BERT":
        raise ConfigError("--model-type BERT: this framework knows GPT models only; give GPT or EarlyExitGPT")
    if args.loader == "llama2_hf" and args.tokenizer_model is None:
        raise ConfigError("--loader llama2_hf needs --tokenizer-model: the model's tokenizer.model")
    tokenizer = {}
    if args.tokenizer_model is not None:
        tokenizer = {"tokenizer_model": args.tokenizer_model}
        if args.loader == "llama2_hf":
            tokenizer["tokenizer_type"] = "Llama2Tokenizer"
    return Conversion(
        args.load_dir, args.save_dir, _LOADERS[args.loader], args.saver, iteration_asked(args), layout_asked(args),
        move=None if args.target_exit_position == "ignore" else args.target_exit_position,
        vocab_size=_vocab_size(args), tokenizer=tokenizer, verify=not args.no_checking,
    )  # fmt: skip


def _vocab_size(args: argparse.Namespace) -> int | None:
    """The tokenizer's ids, as a number or a file says. Raises ConfigError where both say something else."""
    if args.vocab_file is None:
        return args.true_vocab_size
    try:
        words = json.loads(read_small(args.vocab_file, _LARGEST_VOCABULARY))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--vocab-file {args.vocab_file}: cannot read it: {error}") from error
    if not isinstance(words, dict):
        raise DataError(f"--vocab-file {args.vocab_file} holds a {type(words).__name__}, not words and their ids")
    if args.true_vocab_size not in (None, len(words)):
        raise ConfigError(
            f"--true-vocab-size {args.true_vocab_size}: {args.vocab_file} has {len(words)} words; give one of them"
        )
    return len(words)
