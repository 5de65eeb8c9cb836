"""The formats that the converter knows, by the names of --from and --to: how each is opened and written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.convert import megatron_target, native_target
from megatron.checkpoint.convert.base import Check, Layout, Source, Writer
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.checkpoint.convert.huggingface import HfSource
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


def _hf_directory(root: Path, iteration: int | None) -> Path:
    if iteration is not None:
        raise ConfigError(f"--load-iteration {iteration}: a Hugging Face directory has no iterations; leave it out")
    return root


def _write_hf(source: Source, root: Path, _layout: Layout, check: Check) -> Path:
    write_hf(source, root, check=check)
    return root


FORMATS: dict[str, Format] = {
    "native": Format(_found("native"), NativeSource, native_target.write),
    "megatron": Format(_found("megatron"), MegatronSource, megatron_target.write),
    "hf": Format(_hf_directory, HfSource, _write_hf),
}
NAMES = tuple(FORMATS)
