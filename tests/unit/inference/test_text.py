from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.inference.text import TextStream
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.null import NullTokenizer

TEXT = "naïve 字符 🙂 done"


class Bytes(Tokenizer):
    """One id a byte: characters arrive in pieces."""

    vocab_size = 256

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.detokenize([i]) for i in ids]


class DropsFirstBlank(Bytes):
    """As SentencePiece: a blank that begins the text is not written."""

    def detokenize(self, ids: list[int]) -> str:
        return super().detokenize(ids).removeprefix(" ")


def test_characters_appear_whole() -> None:
    stream = TextStream(Bytes())
    parts = [stream.push(i) for i in Bytes().tokenize(TEXT)]
    assert "".join(parts) == TEXT
    assert "" in parts
    assert "🙂" in parts
    assert stream.finish() == ""


def test_what_stays_incomplete_comes_at_the_end() -> None:
    stream = TextStream(Bytes())
    ids = Bytes().tokenize("a🙂")[:-1]
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


@pytest.mark.parametrize("tokenizer", [Bytes(), DropsFirstBlank()])
@given(text=st.text(alphabet=" aé字🙂", max_size=20))
def test_parts_make_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.tokenize(text)
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.detokenize(ids)


def test_separators_between_ids() -> None:
    stream = TextStream(NullTokenizer(10))
    assert [stream.push(i) for i in (3, 10, 7)] == ["3", " 10", " 7"]


def test_sentencepiece_keeps_blanks_between_words(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    from megatron.tokenizer.sentencepiece import GPTSentencePieceTokenizer

    corpus = tmp_path / "text.txt"
    corpus.write_text("one two three four five\nsix seven eight nine ten\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spm"), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = GPTSentencePieceTokenizer(tmp_path / "spm.model")
    ids = tokenizer.tokenize("seven ten one  four")
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.detokenize(ids)
