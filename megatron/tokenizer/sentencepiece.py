"""The three ways Megatron-LM reads a SentencePiece model.

They differ in which special tokens they add and parse, so data made by one must be used with the same one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError
from megatron.tokenizer.base import Tokenizer


def _load(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as err:
        raise ConfigError("this tokenizer type needs the sentencepiece library: pip install 'ee-llm[data]'") from err
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as err:
        raise ConfigError(f"--tokenizer-model {path} is no SentencePiece model: {err}") from err


class GPTSentencePieceTokenizer(Tokenizer):
    """The model as it is: nothing added, nothing parsed; documents end with its own end-of-sentence."""

    def __init__(self, model_file: Path, settings: str = "") -> None:
        super().__init__([model_file], settings)
        self._model = _load(model_file)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    @property
    def bos(self) -> int | None:
        return _known(self._model.bos_id())

    @property
    def eos(self) -> int | None:
        return _known(self._model.eos_id())

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return self._model.decode(list(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        self._check_ids(ids)
        return [self._model.id_to_piece(i) for i in ids]


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """As Llama's own code reads its model: every text begins with the beginning-of-sentence token."""

    def __init__(self, model_file: Path) -> None:
        super().__init__(model_file)
        if self.bos is None:
            raise ConfigError(
                f"--tokenizer-model {model_file} has no beginning-of-sentence token, which Llama2Tokenizer "
                "puts before every text: use --tokenizer-type GPTSentencePieceTokenizer"
            )

    def tokenize(self, text: str) -> list[int]:
        return [self._model.bos_id(), *super().tokenize(text)]


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """The model plus Megatron-LM's special tokens, whose names are parsed wherever they occur in a text.

    Added, in this order and where the model lacks them: <CLS> <SEP> <EOD> <MASK>, then the model's padding,
    beginning and end pieces (<PAD> <BOS> <EOS> where it has none), then <extra_id_0> ... Documents end
    with <EOD>.
    """

    def __init__(self, model_file: Path, vocab_extra_ids: int = 0) -> None:
        super().__init__(model_file, settings=f"vocab_extra_ids={vocab_extra_ids}")
        model = self._model
        self._bos_piece = self._piece_or(model.bos_id(), "<BOS>")
        self._eos_piece = self._piece_or(model.eos_id(), "<EOS>")
        names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", self._piece_or(model.pad_id(), "<PAD>")]
        names += [self._bos_piece, self._eos_piece]
        names += [f"<extra_id_{i}>" for i in range(vocab_extra_ids)]

        known = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        self._vocab_size = len(known)
        self._special: dict[str, int] = {}
        for name in names:
            if name not in known:
                known[name] = self._vocab_size
                self._vocab_size += 1
            self._special[name] = known[name]
        self._special_names = {i: name for name, i in self._special.items()}
        # leftmost first, and among names at one place the one added first
        self._split = re.compile("(" + "|".join(re.escape(name) for name in self._special) + ")")

    def _piece_or(self, token_id: int, default: str) -> str:
        return self._model.id_to_piece(token_id) if token_id >= 0 else default

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos(self) -> int:
        return self._special[self._bos_piece]

    @property
    def eos(self) -> int:
        return self._special[self._eos_piece]

    @property
    def eod(self) -> int:
        return self._special["<EOD>"]

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self._special[part])
            else:
                ids += self._model.encode(part)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Special tokens show by name with a blank on either side, as the original prints them."""
        self._check_ids(ids)
        text = ""
        plain: list[int] = []
        for token in ids:
            if token in self._special_names:
                text += f"{self._model.decode(plain)} {self._special_names[token]} "
                plain = []
            else:
                plain.append(token)
        return text + self._model.decode(plain)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        self._check_ids(ids)
        own = self._model.vocab_size()
        return [self._model.id_to_piece(i) if i < own else self._special_names[i] for i in ids]


def _known(token_id: int) -> int | None:
    """SentencePiece answers -1 for a token that the model hasn't."""
    return token_id if token_id >= 0 else None
