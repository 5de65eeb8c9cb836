"""`tools/checkpoint/checkpoint_converter.py`: formats and layouts changed, exits added and moved; EE-LLM's flags."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.base import Layout
from megatron.checkpoint.convert.convert import Conversion
from megatron.checkpoint.convert.exits import NewExits
from megatron.checkpoint.convert.formats import NAMES
from megatron.cli.conversion import format_in, run
from megatron.cli.guard import run_guarded
from megatron.config.data import TOKENIZER_TYPES
from megatron.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="checkpoint_converter.py",
        allow_abbrev=False,
        description="Convert a checkpoint to another format or layout, add exits to its model, or move them. What was "
        "written is read back and compared, tensor by tensor; nothing is ever replaced.",
    )
    add_places(result)
    result.add_argument("--from", dest="source", choices=NAMES, help="Format of the source (default: by content).")
    result.add_argument("--to", dest="target", choices=NAMES, help="Format of the target (default: as the source).")
    _add_exits(result.add_argument_group("exits"))
    add_layout(result)
    add_tokenizer(result.add_argument_group("tokenizer (default: the source's own)"))
    result.add_argument("--no-verify", dest="verify", action="store_false", help="Don't read the target back.")
    return result


def add_places(result: argparse.ArgumentParser) -> None:
    """The flags that say what lies where."""
    result.add_argument("--load-dir", type=Path, required=True, metavar="DIR", help="Checkpoints to convert from.")
    result.add_argument("--save-dir", type=Path, required=True, metavar="DIR", help="Gets the converted checkpoint.")
    result.add_argument(
        "--load-iteration", type=int, default=0, metavar="N", help="Which one to convert (default: 0, the newest)."
    )
    result.add_argument(
        "--megatron-path", metavar="DIR", help="Accepted without effect: reading a checkpoint imports nothing."
    )


def add_layout(result: argparse.ArgumentParser) -> None:
    """The flags that say how many ranks a target in Megatron's format is for."""
    for name in ("tensor", "pipeline"):
        result.add_argument(
            f"--target-{name}-parallel-size", type=int, metavar="N",
            help=f"{name.capitalize()}-parallel ranks of a target in Megatron's format (default: the source's).",
        )  # fmt: skip


def add_tokenizer(group: Any) -> None:
    """The flags that say which ids the vocabulary has."""
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, metavar="NAME", help="Kind of tokenizer.")
    group.add_argument("--tokenizer-model", metavar="PATH", help="Its file or directory.")
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 BPE.")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 BPE.")
    group.add_argument("--vocab-size", type=int, metavar="N", help="Vocabulary of NullTokenizer.")
    group.add_argument("--vocab-extra-ids", type=int, metavar="N", help="Extra ids of SentencePieceTokenizer.")
    group.add_argument(
        "--true-vocab-size", type=int, metavar="N", help="Ids of the tokenizer: the rows beyond them are padding."
    )


def _add_exits(group: Any) -> None:
    group.add_argument(
        "--conversion-type", choices=("add-exit", "exit-position"), default="add-exit",
        help="Add exits, or move them between a layer's output and the next one's input (default: add-exit).",
    )  # fmt: skip
    group.add_argument("--add-exit-layer-nums", type=int, nargs="+", default=[], metavar="N", help="Layers, from 1.")
    group.add_argument("--use-exit-norm", action="store_true", help="New exits have a norm, like the final one.")
    group.add_argument("--use-exit-mlp", action="store_true", help="... an MLP, like that of their layer.")
    group.add_argument("--use-exit-block", action="store_true", help="... a transformer layer, like the last one.")
    group.add_argument(
        "--tie-exit-output-weights", action="store_true",
        help="... and the word embedding as their output matrix, instead of a copy of the final head's.",
    )  # fmt: skip
    group.add_argument("--random-init", action="store_true", help="Draw the new weights instead of copying.")
    group.add_argument(
        "--init-method-std", type=float, default=0.02, metavar="X", help="Their deviation (default: 0.02)."
    )
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="What they are drawn from (default: 1234).")
    group.add_argument(
        "--target-exit-position", choices=("pre", "post"),
        help="Exits at a layer's input or output (default: post; where some are added to others, as these).",
    )  # fmt: skip
    group.add_argument(
        "--exits-at", type=int, nargs="+", default=[], metavar="N",
        help="Instead: exits that use the model's own final norm and head, for models trained to leave anywhere.",
    )  # fmt: skip

    group.add_argument(
        "--merge-exits", type=Path, metavar="DIR",
        help="Instead: put the exits that --tune-exit saved here into the whole model of --load-dir.",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parser().parse_args(argv)
    return run_guarded(lambda: run(_job(args)), "interrupted; nothing was written")


def _job(args: argparse.Namespace) -> Conversion:
    """What the flags ask for. Raises ConfigError where that makes no sense."""
    iteration = iteration_asked(args)
    source = args.source or format_in(args.load_dir, iteration)
    target = args.target or source
    layout, tokenizer = layout_asked(args), tokenizer_asked(args)
    add, moves = _new_exits(args), args.conversion_type == "exit-position"
    if args.merge_exits and (add or moves or args.exits_at):
        raise ConfigError("--merge-exits takes exits as they are: add or move others in a run of its own")
    if not (add or moves or args.exits_at or args.merge_exits):
        _check_some_work(args, source, target, layout)
    return Conversion(
        args.load_dir, args.save_dir, source, target, iteration, layout, add, tuple(args.exits_at),
        (args.target_exit_position or "post") if moves else None, args.merge_exits, args.true_vocab_size, tokenizer,
        args.verify,
    )  # fmt: skip


def iteration_asked(args: argparse.Namespace) -> int | None:
    """The iteration; None for the newest. Raises ConfigError where there can't be such a one."""
    if args.load_iteration < 0:
        raise ConfigError(f"--load-iteration must not be negative, got {args.load_iteration}")
    return args.load_iteration or None


def layout_asked(args: argparse.Namespace) -> Layout:
    """The target's sizes. Raises ConfigError for what is no number of ranks."""
    sizes = {"tensor": args.target_tensor_parallel_size, "pipeline": args.target_pipeline_parallel_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"--target-{name}-parallel-size must be at least 1, got {size}")
    return Layout(*sizes.values())


def tokenizer_asked(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of TokenizerConfig that flags of its names give."""
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size", "vocab_extra_ids")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _new_exits(args: argparse.Namespace) -> NewExits | None:
    """The exits to add, if any. Raises ConfigError where flags contradict each other."""
    parts = ("use_exit_norm", "use_exit_mlp", "use_exit_block", "tie_exit_output_weights", "random_init")
    given = [f"--{part.replace('_', '-')}" for part in parts if getattr(args, part)]
    if args.conversion_type == "exit-position" and (args.add_exit_layer_nums or args.exits_at or given):
        raise ConfigError("--conversion-type exit-position moves the exits there are: add others in a run of its own")
    if args.exits_at and (args.add_exit_layer_nums or given or args.target_exit_position):
        raise ConfigError("--exits-at declares exits of the model's own norm and head: leave the other exit flags out")
    if args.add_exit_layer_nums:
        return NewExits(
            tuple(args.add_exit_layer_nums), "own" if args.use_exit_norm else "none", args.use_exit_mlp,
            args.use_exit_block, args.target_exit_position, args.tie_exit_output_weights, args.random_init,
            args.init_method_std, args.seed,
        )  # fmt: skip
    if given:
        raise ConfigError(f"{', '.join(given)}: there is no exit to apply to; give --add-exit-layer-nums")
    return None


def _check_some_work(args: argparse.Namespace, source: str, target: str, layout: Layout) -> None:
    if source != target:
        return
    if source == "native":
        raise ConfigError("nothing to convert: runs of any layout read a native checkpoint as it is")
    if layout == Layout() and args.true_vocab_size is None and not tokenizer_asked(args):
        raise ConfigError(
            "nothing to convert: give --add-exit-layer-nums, another format (--to), or --target-tensor-parallel-size "
            "and --target-pipeline-parallel-size"
        )
