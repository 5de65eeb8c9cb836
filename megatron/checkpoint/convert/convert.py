"""One conversion, from a checkpoint of any format to one of any other, changed on the way, and verified."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.agreement import check_agreement
from megatron.checkpoint.convert.base import Layout, Source
from megatron.checkpoint.convert.derived import Watched, fingerprint, moments, origins, split_vocabulary
from megatron.checkpoint.convert.exits import NewExits, Position, add_exits, declare_exits, move_exits
from megatron.checkpoint.convert.formats import FORMATS, Format
from megatron.checkpoint.convert.merge import merge_exits
from megatron.checkpoint.convert.native_source import NativeSource
from megatron.checkpoint.part import check_whole
from megatron.checkpoint.state import PADDING
from megatron.config.data import TokenizerConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.logs import get_logger
from megatron.tokenizer.build import build_tokenizer

_log = get_logger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What is to be done. iteration: None is the newest. vocab_size: ids of the tokenizer, where it is known.

    tokenizer: fields of TokenizerConfig that replace what the source says. merge: what a tuning run saved. At most one
    of add, declare, move and merge.
    """

    load: Path
    save: Path
    source: str
    target: str
    iteration: int | None = None
    layout: Layout = field(default_factory=Layout)
    add: NewExits | None = None
    declare: tuple[int, ...] = ()
    move: Position | None = None
    merge: Path | None = None
    vocab_size: int | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    verify: bool = True


@dataclass(frozen=True)
class Report:
    """What was written where."""

    directory: Path
    tensors: int
    nbytes: int
    with_optimizer: bool


Begin = Callable[[int], Callable[[int], None]]
"""Told how many bytes there will be, answers with what is told each time some of them were read."""


def convert(job: Conversion, begin: Begin) -> Report:
    """Do it. Nothing of the target is visible before it was read back and is equal, tensor by tensor.

    Raises:
        CheckpointError: the source isn't there, is damaged or hostile, or what was written isn't what was read.
        ConfigError: what is asked for makes no sense, or the target's format can't hold it.
        StorageError: the target can't be written, or its place is taken.
    """
    reader, writer = FORMATS[job.source], FORMATS[job.target]
    directory = reader.find(job.load, job.iteration)
    opened = reader.open(directory)
    try:
        check_whole(opened.facts, directory)
        check_agreement(opened, f"{directory}, by its own config,")
        changed = _with_vocabulary(job, _changed(job, opened))
        carried = moments(changed) if job.target == "native" else {}
        if not carried and moments(opened):
            _log.info("the optimizer's state is not carried along: train on with --finetune or --no-load-optim")
        total = sum(it.spec.nbytes for tensors in (origins(changed), carried) for it in tensors.values())
        on_read = begin(total * (2 if job.verify else 1))
        watched = Watched(changed, on_read)
        check = _Verified(writer, watched, bool(carried), on_read) if job.verify else _unchecked
        directory = writer.write(watched, job.save, job.layout, check)
        return Report(directory, len(watched.specs()), total, bool(carried))
    finally:
        opened.close()


def _changed(job: Conversion, source: Source) -> Source:
    """The source with the exits asked for."""
    if job.add is not None:
        return add_exits(source, job.add)
    if job.declare:
        return declare_exits(source, job.declare)
    if job.merge is not None:
        return merge_exits(source, NativeSource(FORMATS["native"].find(job.merge, None)))
    return source if job.move is None else move_exits(source, job.move)


def _with_vocabulary(job: Conversion, source: Source) -> Source:
    """The source with the tokenizer asked for, and its vocabulary apart from padding where that has to be known."""
    config = replace(source.config, tokenizer=replace(source.config.tokenizer, **job.tokenizer))
    vocab_size = job.vocab_size
    if job.target == "native" or job.tokenizer:
        found = _vocab_size(config.tokenizer, job.target)
        if vocab_size not in (None, found):
            raise ConfigError(f"--true-vocab-size {vocab_size}: the tokenizer has {found} ids; give one of them")
        vocab_size = found
    if vocab_size is None:
        return source
    if job.source != "native":  # what padded it was due to its layout
        config = replace(config, model=replace(config.model, padded_vocab_size=None))
    return split_vocabulary(source, vocab_size, config)


def _vocab_size(config: TokenizerConfig, target: str) -> int:
    try:
        return build_tokenizer(**asdict(config)).vocab_size
    except ConfigError as error:
        if target != "native":
            raise
        raise ConfigError(
            f"a native checkpoint carries its tokenizer, and this one can't be had: {error}. Give --tokenizer-type "
            "and --tokenizer-model (or --vocab-file and --merge-file)"
        ) from error


def _unchecked(path: Path) -> None:
    """Nothing is read back."""


@dataclass(frozen=True)
class _Verified:
    """Reads a target back and compares it with what was read of its source. carried: the optimizer's state, too."""

    writer: Format
    source: Watched
    carried: bool
    on_read: Callable[[int], None]

    def __call__(self, path: Path) -> None:
        """Raises CheckpointError naming the tensors that differ."""
        opened = self.writer.open(path)
        try:
            vocab_size = self.source.specs()["embedding.word.weight"].shape[0]
            target = split_vocabulary(opened, vocab_size, opened.config)
            found = origins(target) | (moments(target) if self.carried else {})
            wanted = {**self.source.specs(), **(self.source.moments() if self.carried else {})}
            # rows that pad a vocabulary may be fewer or more in another layout
            padding = [name for name in {*found, *wanted} if name.endswith(PADDING)]
            for name in padding:
                if name not in found or wanted.get(name) != found[name].spec:
                    found.pop(name, None), wanted.pop(name, None)
            wrong = found.keys() ^ wanted.keys()
            for name in found.keys() - wrong:
                if fingerprint(found[name].read()) != self.source.hashes.get(name):
                    wrong.add(name)
                self.on_read(found[name].spec.nbytes)
        finally:
            opened.close()
        if wrong:
            shown = ", ".join(sorted(wrong)[:8])
            raise CheckpointError(f"what was written to {path.parent} is not what was read, and is removed: {shown}")
