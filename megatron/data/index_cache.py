"""Index arrays kept on disk under the md5 of a text that describes them, as Megatron keeps them.

A description with md5 `M` owns `M.dsc` (the text itself) and `M_<name>.npy` per array in one directory. `.dsc` is
written last, so a set that has it was complete once; what is read is checked all the same.
"""

import hashlib
import os
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.files import atomic_write
from megatron.logs import get_logger

logger = get_logger(__name__)

# What numpy raises for a header that is none, and a check for an array of another shape.
_MALFORMED = (
    ArithmeticError, EOFError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError,
)  # fmt: skip

Arrays = dict[str, np.ndarray]


@dataclass
class CachedArrays:
    """Named index arrays: memory-mapped from `paths`, or held in memory where `paths` is None.

    Mapped arrays pickle as their paths, so that worker processes share one copy.
    """

    arrays: Arrays
    paths: dict[str, str] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def source(self) -> str:
        """Where the arrays came from, for error messages."""
        return os.path.dirname(next(iter(self.paths.values()))) if self.paths else "memory"

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "arrays": {} if self.paths else self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self.arrays = _map(self.paths) if self.paths else state["arrays"]


@dataclass(frozen=True)
class IndexRecipe:
    """How to recognise, check and make one set of arrays.

    `check` raises ValueError with the reason if the arrays cannot be what `description` says.
    """

    description: str
    names: tuple[str, ...]
    check: Callable[[Arrays], None]
    build: Callable[[], Arrays]

    def paths(self, directory: str) -> dict[str, str]:
        """The `.npy` file of each array."""
        return {name: f"{self._stem(directory)}_{name}.npy" for name in self.names}

    def description_path(self, directory: str) -> str:
        return self._stem(directory) + ".dsc"

    def _stem(self, directory: str) -> str:
        digest = hashlib.md5(self.description.encode(), usedforsecurity=False).hexdigest()
        return os.path.join(directory, digest)


def load_or_build(recipe: IndexRecipe, directories: Sequence[str]) -> CachedArrays:
    """Arrays of `recipe` from the first of `directories` that has them whole, else built and stored.

    New arrays go into the last directory that can be written; where none can, they stay in memory and a
    warning says so. Several processes may do this at once: they write the same bytes.
    """
    for directory in directories:
        found = _load(recipe, directory)
        if found is not None:
            return found
    arrays = recipe.build()
    for directory in reversed(directories):
        try:
            return _store(recipe, directory, arrays)
        except OSError as error:
            logger.warning("index cache %s cannot be written (%s)", directory, error.strerror or error)
    if directories:
        logger.warning("index arrays are kept in memory and will be built again; --data-cache-path can keep them")
    return CachedArrays(arrays)


def _map(paths: dict[str, str]) -> Arrays:
    return {name: np.lib.format.open_memmap(path, mode="r") for name, path in paths.items()}  # no pickles, no zips


def _load(recipe: IndexRecipe, directory: str) -> CachedArrays | None:
    """The arrays in `directory`; None if they are not there, or damaged (which is logged)."""
    paths = recipe.paths(directory)
    description_path = recipe.description_path(directory)
    present = [os.path.isfile(path) for path in (description_path, *paths.values())]
    if not any(present):
        return None
    try:
        if not all(present):
            raise ValueError("some of its files are missing")
        with open(description_path, encoding="utf-8") as file:
            if file.read() != recipe.description:
                raise ValueError("its description is another one")
        arrays = _map(paths)
        recipe.check(arrays)
    except (OSError, *_MALFORMED) as error:
        logger.warning("index cache %s is damaged and will be built again: %s", description_path, error)
        return None
    return CachedArrays(arrays, paths)


def _store(recipe: IndexRecipe, directory: str, arrays: Arrays) -> CachedArrays:
    os.makedirs(directory, exist_ok=True)
    paths = recipe.paths(directory)
    for name, path in paths.items():
        with atomic_write(path) as file:
            np.save(file, arrays[name], allow_pickle=False)
    with atomic_write(recipe.description_path(directory)) as file:
        file.write(recipe.description.encode())
    return CachedArrays(_map(paths), paths)
