"""The formats that the converter knows, by the names of --from and --to: how each is opened and written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.convert import megatron_target, native_target
from megatron.checkpoint.convert.base import Source, Writer
from megatron.checkpoint.convert.megatron_source import MegatronSource
from megatron.checkpoint.convert.native_source import NativeSource
from megatron.checkpoint.find import recognise
from megatron.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Format:
    """find: which directory holds the checkpoint of an iteration (None: the newest) below a root, whole.

    open: a source of that directory, or of a target that was just written. write: as `base.Writer`.
    """

    find: Callable[[Path, int | None], Path]
    open: Callable[[Path], Source]
    write: Writer


def _found(name: str) -> Callable[[Path, int | None], Path]:
    def find(root: Path, iteration: int | None) -> Path:
        found = recognise(root, iteration)
        if found.format != name:
            raise CheckpointError(
                f"{found.directory} is in {found.format} format, not {name}: give --from {found.format}"
            )
        return found.directory

    return find


FORMATS: dict[str, Format] = {
    "native": Format(_found("native"), NativeSource, native_target.write),
    "megatron": Format(_found("megatron"), MegatronSource, megatron_target.write),
}
NAMES = ("native", "megatron", "hf")


def format_named(name: str) -> Format:
    """The format of --from or --to. Raises ConfigError where it isn't there."""
    if name not in FORMATS:
        raise ConfigError(f"format {name} is not there yet: choose {' or '.join(FORMATS)}")
    return FORMATS[name]
