"""Small token files and a log that stays readable whatever other tests did to the loggers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedWriter

WriteCorpus = Callable[..., str]


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """`write_corpus(lengths, name=…, dtype=…)`: documents of random tokens below 500; returns the prefix."""

    def write(lengths: Sequence[int], name: str = "corpus", dtype: type = np.uint16) -> str:
        random = np.random.RandomState(len(lengths))
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, dtype) as writer:
            for length in lengths:
                writer.add_document(random.randint(0, 500, length))
        return prefix

    return write


@pytest.fixture
def corpus(write_corpus: WriteCorpus) -> IndexedDataset:
    """40 documents of 1 to 60 tokens."""
    return IndexedDataset(write_corpus([1 + 37 * i % 60 for i in range(40)]))


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs during a test."""
    logger = logging.getLogger("megatron")
    handler, level = _Messages(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.texts
    logger.removeHandler(handler)
    logger.setLevel(level)
