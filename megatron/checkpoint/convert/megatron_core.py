"""Distributed checkpoints of Megatron-core, which are not read: recognised, so that the user learns what helps."""

from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.convert.hf_config import read_json
from megatron.errors import CheckpointError

_DESCRIPTION = "metadata.json"


def refuse_megatron_core(root: Path) -> None:
    """Raise CheckpointError where `root` is, or holds, what Megatron-core's dist_checkpointing writes."""
    for directory in _candidates(root):
        if _is_distributed(directory / _DESCRIPTION):
            raise CheckpointError(
                f"{directory} is a distributed checkpoint of Megatron-core, which is not read: export it to Hugging "
                "Face's format (Megatron Bridge's AutoBridge.export_ckpt does) and convert that directory"
            )


def _candidates(root: Path) -> Iterator[Path]:
    yield root
    yield root / "release"
    try:
        yield from sorted(root.glob("iter_*"), reverse=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error}") from error


def _is_distributed(path: Path) -> bool:
    """Whether a file is the description that Megatron-core puts beside the shards."""
    try:
        return path.is_file() and "sharded_backend" in read_json(path)
    except CheckpointError:  # somebody else's file of that name
        return False
