"""`tools/generate_text.py`: text from a checkpoint as it resolves, or a table that compares exit thresholds."""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron.cli.guard import run_guarded
from megatron.config.data import TOKENIZER_TYPES, TokenizerConfig
from megatron.errors import ConfigError, DataError
from megatron.exits.spec import FINAL
from megatron.inference.build import load_model
from megatron.inference.engine import Engine
from megatron.inference.measure import as_table, compare_thresholds
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import SamplingParams, Token
from megatron.inference.text import TextStream
from megatron.logs import setup_logging
from megatron.tokenizer.base import Tokenizer

_COLOURS = ("32", "36", "33", "35", "34")  # of the exits, shallow first; the final head keeps the terminal's own
_DIM = "2"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="generate_text.py", description="Generate text from a checkpoint.", allow_abbrev=False
    )
    add = result.add_argument
    add("--load", required=True, metavar="DIR", help="Checkpoint, or directory of checkpoints: native or Megatron's.")
    add("--load-iteration", type=int, metavar="N", help="Iteration to load (default: the newest).")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="Texts to continue (default: a new document).")
    source.add_argument("--prompt-file", metavar="FILE", help='A text to continue; .jsonl: one {"text": …} a line.')
    add("--tokens-to-generate", type=int, default=64, metavar="N", help="Most tokens to generate (default: 64).")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default).")
    add("--top-k", type=int, default=0, metavar="K", help="Sample among the K most probable tokens.")
    add("--top-p", type=float, default=0.0, metavar="P", help="Sample among the smallest set of probability P.")
    add("--seed", type=int, default=1234, help="Start of each text's random stream (default: 1234).")

    exits = result.add_argument_group("early exits")
    exits.add_argument("--use-early-exit", action="store_true", help="Let tokens leave at exits.")
    exits.add_argument(
        "--early-exit-thres", type=float, metavar="T", help="Leave where the top probability reaches T (default: 0.8)."
    )
    exits.add_argument("--exit-layers", type=int, nargs="+", metavar="N", help="Exits to look at (default: all).")
    exits.add_argument("--max-deferred", type=int, metavar="N", help="Most tokens that may wait for deeper layers.")
    exits.add_argument("--show-exits", action="store_true", help="Mark which exit emitted what (terminals: by colour).")
    exits.add_argument(
        "--compare", type=float, nargs="+", metavar="T",
        help="Instead of text, a table: speed, exits and agreement with the full model at these thresholds (greedy).",
    )  # fmt: skip
    exits.add_argument("--repeats", type=int, metavar="N", help="Rounds of --compare (default: 3).")

    where = result.add_argument_group("device and number format")
    where.add_argument("--device", choices=("cpu", "cuda"), help="Default: the GPU where there is one.")
    where.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="Default: as trained.")

    words = result.add_argument_group("tokenizer", "Needed for Megatron's checkpoints, which carry none.")
    words.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    words.add_argument("--tokenizer-model", metavar="PATH")
    words.add_argument("--vocab-file", metavar="FILE")
    words.add_argument("--merge-file", metavar="FILE")
    words.add_argument("--vocab-size", type=int, metavar="N")
    words.add_argument("--vocab-extra-ids", type=int, default=0, metavar="N")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parser().parse_args(argv)
    setup_logging(logging.WARNING)  # notes would stand in the text
    return run_guarded(lambda: _run(args), "\nstopped")


def _run(args: argparse.Namespace) -> None:
    params = SamplingParams(args.tokens_to_generate, args.temperature, args.top_k, args.top_p, args.seed)
    policy = _policy(args)
    texts = _texts(args)
    model, tokenizer, _ = load_model(
        args.load, args.load_iteration, device=args.device, dtype=args.dtype, tokenizer=_tokenizer(args)
    )
    engine = Engine(model, tokenizer)
    _check_exits(engine, args)
    prompts = [_ids(text, tokenizer) for text in texts]
    if args.compare:
        _compare(engine, prompts, args)
        return
    for text, prompt in zip(texts, prompts, strict=True):
        _write_text(engine, text, prompt, params, policy, args.show_exits)


def _policy(args: argparse.Namespace) -> ConfidencePolicy | None:
    """The exit policy of the flags; ConfigError for flags that contradict each other."""
    for flag in ("early_exit_thres", "max_deferred"):
        if getattr(args, flag) is not None and not args.use_early_exit:
            raise ConfigError(f"--{flag.replace('_', '-')} needs --use-early-exit")
    if args.exit_layers and not (args.use_early_exit or args.compare):
        raise ConfigError("--exit-layers needs --use-early-exit or --compare")
    if args.compare:
        for flag in ("use_early_exit", "temperature", "top_k", "top_p", "show_exits"):
            if getattr(args, flag):
                raise ConfigError(f"--compare is greedy, at its own thresholds: leave out --{flag.replace('_', '-')}")
    elif args.repeats is not None:
        raise ConfigError("--repeats needs --compare")
    if args.repeats is not None and args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: at least one round is needed")
    if not args.use_early_exit:
        return None
    threshold = 0.8 if args.early_exit_thres is None else args.early_exit_thres
    return ConfidencePolicy(threshold, tuple(args.exit_layers or ()), args.max_deferred)


def _check_exits(engine: Engine, args: argparse.Namespace) -> None:
    there = [int(spec.label) for spec in engine.model.exit_specs()]
    if (args.use_early_exit or args.compare) and not there:
        raise ConfigError(f"{args.load} holds a model without exits: train one with --exit-layer-nums")
    for number in args.exit_layers or ():
        if number not in there:
            raise ConfigError(f"--exit-layers {number}: the model's exits are {' '.join(map(str, there))}")


def _tokenizer(args: argparse.Namespace) -> TokenizerConfig | None:
    if args.tokenizer_type is None:
        for flag in ("tokenizer_model", "vocab_file", "merge_file", "vocab_size", "vocab_extra_ids"):
            if getattr(args, flag):
                raise ConfigError(f"--{flag.replace('_', '-')} needs --tokenizer-type")
        return None
    return TokenizerConfig(
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_file,
        args.merge_file,
        args.vocab_size,
        args.vocab_extra_ids,
    )


def _texts(args: argparse.Namespace) -> list[str]:
    if args.prompt_file is None:
        texts = args.prompt or [""]
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that were no UTF-8
                raise ConfigError(f"--prompt {text!a} is no UTF-8 text")
        return texts
    path = Path(args.prompt_file)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            texts.append(_text_of(line, f"--prompt-file {path}, line {number}"))
    if not texts:
        raise DataError(f"--prompt-file {path} holds no prompt")
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: expected {{"text": "…"}}')
    return text


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids; no text starts a new document, as in training, behind an end of one."""
    ids = tokenizer.tokenize(text)
    if ids:
        return ids
    if tokenizer.eos is None:
        raise ConfigError("--prompt is needed: the tokenizer has no end-of-document token to start from")
    return [tokenizer.eod]


def _compare(engine: Engine, prompts: list[list[int]], args: argparse.Namespace) -> None:
    with tqdm(desc="Compare", unit=" texts", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        rows = compare_thresholds(
            engine,
            prompts,
            args.compare,
            args.tokens_to_generate,
            args.repeats or 3,
            tuple(args.exit_layers or ()),
            progress,
        )
    sys.stdout.write(as_table(rows) + "\n")


def _write_text(
    engine: Engine, text: str, prompt: list[int], params: SamplingParams, policy: ConfidencePolicy | None, marks: bool
) -> None:
    """Write the prompt and its continuation as it comes, then one line about it and an empty one."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    stream = engine.stream(prompt, params, policy)
    sys.stdout.write(_painted(text, _DIM) if colour else text)
    decoder, tokens, last = TextStream(engine.tokenizer), [], ""
    for token in stream:
        tokens.append(token)
        part = decoder.push(token.id)
        if marks and not colour and token.exit != last:
            part = f"[{token.exit}]{part}"
        elif marks and colour:
            part = _painted(part, _colour_of(engine, token.exit))
        last = token.exit
        sys.stdout.write(part)
        sys.stdout.flush()
    sys.stdout.write(decoder.finish() + "\n\n" + _summary(engine, tokens, marks and colour) + "\n\n")


def _summary(engine: Engine, tokens: list[Token], colour: bool) -> str:
    count = Counter(token.exit for token in tokens)
    seconds = sum(token.seconds for token in tokens)
    parts = []
    for head in engine.model.head_labels():
        name = head if head == FINAL else f"exit {head}"
        name = _painted(name, _colour_of(engine, head)) if colour else name
        parts.append(f"{name} {count[head] / len(tokens):.0%}")
    return f"({len(tokens)} tokens in {seconds:.2f} s, {len(tokens) / seconds:.0f} tokens/s; {', '.join(parts)})"


def _colour_of(engine: Engine, head: str) -> str:
    return "" if head == FINAL else _COLOURS[engine.model.head_labels().index(head) % len(_COLOURS)]


def _painted(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if text and code else text
