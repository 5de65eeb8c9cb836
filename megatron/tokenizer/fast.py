"""The common part of all tokenizers that run on the `tokenizers` library (byte-level BPE and others)."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from megatron.tokenizer.base import Tokenizer


class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind our interface; its own truncation and padding are switched off."""

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        files: Sequence[Path],
        eos: int | None,
        bos: int | None = None,
    ) -> None:
        super().__init__(files)
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._eos = eos
        self._bos = bos
        # ids may have holes, and the embedding must reach the largest one
        self._vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos(self) -> int | None:
        return self._bos

    @property
    def eos(self) -> int | None:
        return self._eos

    def tokenize(self, text: str) -> list[int]:
        return self._library.encode(text).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return self._library.decode(list(ids), skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each id on its own; a token that is part of a character shows as U+FFFD."""
        return [self.detokenize([i]) for i in ids]
