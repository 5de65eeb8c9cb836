"""What every tokenizer answers, whichever library is behind it.

Neighbours hold a `Tokenizer` made by `megatron.tokenizer.build.build_tokenizer` and know nothing else.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from megatron.errors import ConfigError, DataError


class Tokenizer(ABC):
    """Text to token ids and back. Ids lie in [0, vocab_size)."""

    def __init__(self, files: Sequence[Path] = (), settings: str = "") -> None:
        """`files`: what it was built from; `settings`: whatever else decides the ids (for `fingerprint`)."""
        self._files = list(files)
        self._settings = settings

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added tokens included, padding for the model excluded."""

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-text token, where there is one."""
        return None

    @property
    def eos(self) -> int | None:
        """Id of the end-of-text token, where there is one."""
        return None

    @property
    def eod(self) -> int:
        """Id that separates documents. ConfigError where the tokenizer names none."""
        if self.eos is None:
            named = f" ({self._files[0]})" if self._files else ""
            raise ConfigError(
                f"this tokenizer{named} names no end-of-text token, which is needed to separate documents: "
                "set eos_token in the tokenizer_config.json beside it"
            )
        return self.eos

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, which must be encodable as UTF-8 (no lone surrogates)."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` of each text; overridden where a library does many at once faster."""
        return [self.tokenize(text) for text in texts]

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`. DataError for an id outside the vocabulary."""

    @abstractmethod
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One string per id: raw pieces for SentencePiece, decoded text for the others."""

    def files(self) -> list[Path]:
        """The files it was built from: copied beside a checkpoint, they build the same tokenizer again."""
        return list(self._files)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the type, its settings and the contents of its files: equal means the same ids."""
        digest = hashlib.sha256(f"{type(self).__name__}\n{self._settings}\n".encode())
        for path in self._files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Libraries differ in what they make of a foreign id (drop, crash, wrap): here it is one error."""
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise DataError(f"token id {bad} is outside the tokenizer's vocabulary of {self.vocab_size}")


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int = 1) -> int:
    """Smallest multiple of `divisible_by * tensor_parallel_size` that holds `vocab_size` ids."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple
