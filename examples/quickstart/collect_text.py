"""Collects text that every machine with Python has: python collect_text.py --output DIR --megabytes 12.

Of the standard library (and, where more is wanted, of its tests and of the libraries installed for EE-LLM) it takes
`prose`: docstrings, comments and the language reference that pydoc carries, and `code`: the sources themselves.
DIR gets prose and code as JSON lines, for training and held out. The same machine gives the same files.
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType

from tqdm import tqdm

KINDS = ("prose", "code")
PARTS = ("train", "heldout")
SUMMARY = "summary.json"
FILES = {SUMMARY, *(f"{part}_{kind}.jsonl" for part in PARTS for kind in KINDS)}
HELD_OUT_SHARE = 0.08
TOPICS = "topics.py"  # the language reference: too large a share of all prose to be left out of training
LIBRARIES = ("numpy", "torch", "setuptools", "pip")  # read only where the standard library is not enough
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "encodings", "test", "tests", "idle_test"}


def draw(name: str) -> float:
    """A number in [0, 1) that looks random and depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


@dataclass(frozen=True)
class Source:
    """A file to read; `name` is its path below the library's directory, the same on every machine."""

    path: Path
    name: str

    @property
    def part(self) -> str:
        """`train` or `heldout`, by a hash of the file's own name.

        The directory does not count, so that a module and a copy that another library carries stay together.
        """
        names = Path(self.name).parts
        key = "/".join(names[-2:]) if names[-1] in ("__init__.py", "__main__.py") else names[-1]
        return "heldout" if draw(key) < HELD_OUT_SHARE and key != TOPICS else "train"


@dataclass
class Collection:
    """Documents written so far; remembers what it has, so that nothing is taken twice."""

    directory: Path
    size: dict[str, int] = field(default_factory=lambda: {f"{p}_{k}": 0 for p in PARTS for k in KINDS})
    files: dict[str, int] = field(default_factory=lambda: {part: 0 for part in PARTS})
    seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self._out = {name: open(self.directory / f"{name}.jsonl", "w", encoding="utf-8") for name in self.size}  # noqa: SIM115

    def total(self) -> int:
        """Bytes of text."""
        return sum(self.size.values())

    def is_new(self, text: str) -> bool:
        """Whether this text was not met before; it is remembered."""
        digest = hashlib.sha256(text.encode()).digest()
        new = digest not in self.seen
        self.seen.add(digest)
        return new

    def add(self, source: Source) -> None:
        """Take a file's prose and code, unless it cannot be read as Python or was met before."""
        text = read_source(source.path)
        if text is None or not self.is_new(text):
            return
        tree = parse(text)
        if tree is None:
            return
        self.files[source.part] += 1
        if source.path.name != TOPICS:
            self._write(source, "code", text)
        paragraphs = [p for p in prose(text, tree, source.path.name == TOPICS) if self.is_new(p)]
        if paragraphs:
            self._write(source, "prose", "\n\n".join(paragraphs) + "\n")

    def _write(self, source: Source, kind: str, text: str) -> None:
        name = f"{source.part}_{kind}"
        self._out[name].write(json.dumps({"text": text, "source": source.name}) + "\n")
        self.size[name] += len(text.encode())

    def close(self) -> None:
        """Write the summary, and make sure that everything is on disk."""
        for file in self._out.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        about = {"python": sys.version.split()[0], "bytes": self.size, "files": self.files}
        (self.directory / SUMMARY).write_text(json.dumps(about, indent=2) + "\n")


def find_sources(root: Path, skipped: set[str]) -> list[Source]:
    """All Python files below `root`: the language reference first, then mixed, the same way on every machine."""
    found: list[Source] = []
    for directory, below, names in os.walk(root):
        below[:] = sorted(set(below) - skipped)
        paths = [Path(directory, name) for name in names if name.endswith(".py")]
        found += [Source(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(found, key=lambda source: (source.path.name != TOPICS, draw(source.name)))


def stages() -> Iterator[list[Source]]:
    """What to read, the best first: standard library, its tests, installed libraries."""
    standard = Path(sysconfig.get_path("stdlib"))
    yield find_sources(standard, SKIPPED)
    yield find_sources(standard / "test", SKIPPED - {"test", "tests"}) if (standard / "test").is_dir() else []
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        for place in (spec.submodule_search_locations or []) if spec else []:
            yield find_sources(Path(place), SKIPPED)


def read_source(path: Path) -> str | None:
    """A file's text with plain line ends; None where it cannot be read or is a table of numbers, not a program."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    letters = sum(map(str.isalpha, text))
    return text if letters > 0.4 * len(text) and "\0" not in text else None


def parse(text: str) -> ast.Module | None:
    """The file as a tree; None for what is no Python of this version (the tests hold such files on purpose)."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def prose(text: str, tree: ast.Module, all_strings: bool = False) -> Iterator[str]:
    """Paragraphs of language in docstrings (or in all strings), then in comments."""
    for node in ast.walk(tree):
        if all_strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from paragraphs(node.value)
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from paragraphs(ast.get_docstring(node) or "")
    for block in re.findall(r"(?:^[ \t]*#.*\n)+", text, re.MULTILINE):
        yield from paragraphs(re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text` that read like language: not examples, tables or commented-out code."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = "\n".join(line.rstrip() for line in inspect.cleandoc(block).splitlines())
        plain = sum(c.isalpha() or c.isspace() for c in paragraph)
        if len(paragraph.split()) >= 8 and plain >= 0.85 * len(paragraph) and ">>>" not in paragraph:
            yield paragraph


def collect(directory: Path, target: int) -> Collection:
    """Read stage after stage until `target` bytes are there."""
    collection = Collection(directory)
    with tqdm(total=target, unit="B", unit_scale=True, desc="Collected", dynamic_ncols=True, disable=None) as bar:
        for source in chain.from_iterable(stages()):
            if collection.total() >= target:
                break
            collection.add(source)
            bar.update(min(target, collection.total()) - bar.n)
    collection.close()
    return collection


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # what was begun is cleaned up


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="made whole or not at all")
    parser.add_argument("--megabytes", type=float, default=12, help="how much text to look for (default: 12)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    foreign = sorted(name for name in _names(options.output) if name not in FILES)
    if foreign:
        sys.stderr.write(f"error: --output {options.output} would be replaced, but holds {foreign[0]}: name another\n")
        return 2
    temporary = options.output.with_name(f"{options.output.name}.{os.getpid()}.tmp")
    try:
        collection = collect(temporary, int(options.megabytes * 1e6))
        shutil.rmtree(options.output, ignore_errors=True)
        os.replace(temporary, options.output)
    except OSError as error:
        sys.stderr.write(f"error: cannot write {options.output}: {error}\n")
        return 5
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size, files = collection.size, collection.files
    out = io.StringIO()
    for part, title in zip(PARTS, ("to train on", "held out"), strict=True):
        amounts = " and ".join(f"{size[f'{part}_{kind}'] / 1e6:.1f} MB of {kind}" for kind in KINDS)
        out.write(f"{title}: {amounts} from {files[part]:,} files\n")
    sys.stdout.write(out.getvalue())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
