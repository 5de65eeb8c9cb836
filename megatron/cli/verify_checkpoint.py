"""`tools/verify_checkpoint.py DIR`: what is in a checkpoint, or in each of a directory, and whether it is whole."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint import manifest, native
from megatron.checkpoint.find import NATIVE, Found, checkpoints_in
from megatron.checkpoint.state import MODEL
from megatron.checkpoint.typed import count
from megatron.cli.guard import run_guarded
from megatron.errors import CheckpointError

_MOST_NAMES = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code: 4 where anything is damaged or nothing is there."""
    about = "Say what is in a checkpoint, or in each of a directory of them, and whether it is whole."
    parser = argparse.ArgumentParser(prog="verify_checkpoint.py", description=about, allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="as of --save, or one iteration in it")
    parser.add_argument("--tensors", action="store_true", help="list every tensor: name, shape, type")
    options = parser.parse_args(argv)
    return run_guarded(lambda: _run(options.directory, options.tensors), "\nstopped")


def _run(directory: Path, tensors: bool) -> None:
    found = checkpoints_in(directory)
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoint")
    damaged = [checkpoint.directory for checkpoint in found if not _report(checkpoint, tensors)]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(found)} damaged: {', '.join(path.name for path in damaged)}")


def _report(found: Found, tensors: bool) -> bool:
    """Write what there is to say; whether it is whole as far as can be known."""
    sys.stdout.write(f"{found.directory}\n")
    if found.format != NATIVE:
        sys.stdout.write("  Megatron's format: it carries no checksums\n")
        return True
    try:
        sizes, unlisted = manifest.verify(found.directory), manifest.unlisted(found.directory)
        facts, index = native.read_facts(found.directory), native.tensor_index(found.directory)
        samples = count({"consumed_samples": 0} | facts, "consumed_samples", str(found.directory))
    except CheckpointError as error:
        sys.stdout.write(f"  DAMAGED: {error}\n")
        return False
    sys.stdout.write(
        f"  whole: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, every byte as it was written\n"
        f"  iteration {facts['iteration']:,}, {samples:,} samples, written with torch "
        f"{_shown(facts.get('torch', '?'))}\n"
    )
    if unlisted:
        sys.stdout.write(f"  not part of it, and not read: {', '.join(map(_shown, unlisted))}\n")
    kinds = Counter("model" if name.startswith(MODEL) else name.split("/")[0] for name in index)
    parameters = sum(math.prod(shape) for name, (shape, _) in index.items() if name.startswith(MODEL))
    parts = ", ".join(f"{number} {_shown(kind)} tensors" for kind, number in kinds.items())
    sys.stdout.write(f"  {parts}; {parameters:,} parameters\n")
    if tensors:
        for name, (shape, dtype) in sorted(index.items()):
            sys.stdout.write(f"    {_shown(name)} {list(shape)} {str(dtype).removeprefix('torch.')}\n")
    return True


def _shown(text: object) -> str:
    """Text out of a file as a terminal may get it: control characters would be obeyed, not shown."""
    return text if isinstance(text, str) and text.isprintable() else ascii(text)
