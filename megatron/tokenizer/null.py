"""A tokenizer for data that are numbers already: "12 7 9" stands for the ids 12, 7, 9."""

from collections.abc import Sequence

from megatron.errors import ConfigError, DataError
from megatron.tokenizer.base import Tokenizer


class NullTokenizer(Tokenizer):
    """Ids written as decimal text. `vocab_size` ids of the data's own, then one more: the end of document."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ConfigError(f"--vocab-size must be at least 1 for NullTokenizer, got {vocab_size}")
        super().__init__(settings=f"vocab_size={vocab_size}")
        self._eod = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._eod + 1

    @property
    def eos(self) -> int:
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        """DataError where a word is no number or is outside [0, vocab_size)."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as err:
            raise DataError(f"NullTokenizer reads numbers separated by blanks: {err}") from err
        self._check_ids(ids)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        self._check_ids(ids)
        return [str(i) for i in ids]
