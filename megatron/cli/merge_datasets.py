"""Joins the `.bin/.idx` pairs of a directory, in the order of their names, into one."""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron.cli.guard import run_guarded
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.errors import DataError


def find_prefixes(directory: str) -> list[str]:
    """Prefixes of all pairs in `directory`, sorted by name; DataError where there is none, or half of one."""
    if not os.path.isdir(directory):
        raise DataError(f"--input {directory} is not a directory")
    names = os.listdir(directory)
    pairs = [{name[:-4] for name in names if name.endswith(ending)} for ending in (".bin", ".idx")]
    lone = sorted(pairs[0] ^ pairs[1])
    if lone:
        raise DataError(f"{os.path.join(directory, lone[0])} has only one of its .bin and .idx files")
    if not pairs[0]:
        raise DataError(f"--input {directory} holds no .bin/.idx pair")
    return [os.path.join(directory, name) for name in sorted(pairs[0])]


def merge(directory: str, output_prefix: str) -> int:
    """Write all pairs of `directory` to `output_prefix`; returns the number of documents."""
    prefixes = find_prefixes(directory)
    if os.path.realpath(output_prefix) in [os.path.realpath(prefix) for prefix in prefixes]:
        raise DataError(f"--output-prefix {output_prefix} is itself in --input {directory}; choose another")
    documents = 0
    with IndexedWriter(output_prefix, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            documents += writer.add_index(prefix)
    return documents


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `tools/merge_datasets.py`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="DIR", help="directory with .bin/.idx pairs of one dtype")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    options = parser.parse_args(argv)
    return run_guarded(lambda: _run(options), "interrupted; nothing was written")


def _run(options: argparse.Namespace) -> None:
    documents = merge(options.input, options.output_prefix)
    sys.stdout.write(f"{documents} documents in {options.output_prefix}.bin and .idx\n")
