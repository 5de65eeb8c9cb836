"""The three SentencePiece types: special tokens, their order and ids, and parsing."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.sentencepiece import (
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)

PIECES = 330


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sentencepiece_model, vocab_extra_ids=2)


@pytest.fixture(scope="module")
def plain(sentencepiece_model: Path) -> GPTSentencePieceTokenizer:
    return GPTSentencePieceTokenizer(sentencepiece_model)


def test_special_tokens_follow_the_pieces(tokenizer: SentencePieceTokenizer, sentencepiece_model: Path) -> None:
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>"]
    assert tokenizer.vocab_size == PIECES + len(added)
    assert tokenizer.pieces(range(PIECES, tokenizer.vocab_size)) == added
    assert tokenizer.eod == PIECES + 2
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)  # the model's own <s> and </s>
    assert tokenizer.files() == [sentencepiece_model]
    assert SentencePieceTokenizer(sentencepiece_model).vocab_size == PIECES + 5


def test_special_tokens_are_parsed(tokenizer: SentencePieceTokenizer, plain: GPTSentencePieceTokenizer) -> None:
    ids = tokenizer.tokenize("the fox<EOD><extra_id_1>lazy dog</s>")
    expected = [*plain.tokenize("the fox"), tokenizer.eod, PIECES + 6, *plain.tokenize("lazy dog"), 2]
    assert ids == expected
    assert tokenizer.detokenize(ids) == "the fox <EOD>  <extra_id_1> lazy dog </s> "
    assert tokenizer.pieces(ids)[-1] == "</s>"
    assert tokenizer.eod not in plain.tokenize("the fox<EOD>")
    assert tokenizer.tokenize("<EOD") == plain.tokenize("<EOD")


def test_pieces_are_raw(plain: GPTSentencePieceTokenizer) -> None:
    pieces = plain.pieces(plain.tokenize("the fox"))
    assert "".join(pieces) == "▁the▁fox"


@given(st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1))
def test_text_without_special_names_agrees_with_the_plain_type(
    tokenizer: SentencePieceTokenizer, plain: GPTSentencePieceTokenizer, text: str
) -> None:
    if not any(name in text for name in ("<s>", "</s>", "<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_")):
        assert tokenizer.tokenize(text) == plain.tokenize(text)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == plain.detokenize(plain.tokenize(text))


def test_plain_type_adds_nothing(plain: GPTSentencePieceTokenizer) -> None:
    assert (plain.vocab_size, plain.bos, plain.eos, plain.eod) == (PIECES, 1, 2, 2)
    assert plain.tokenize("") == []


def test_llama_begins_every_text(sentencepiece_model: Path, plain: GPTSentencePieceTokenizer) -> None:
    llama = Llama2Tokenizer(sentencepiece_model)
    assert llama.tokenize("the dog") == [1, *plain.tokenize("the dog")]
    assert llama.tokenize("") == [1]
    assert llama.tokenize_batch(["", "the"]) == [[1], llama.tokenize("the")]
    assert llama.detokenize(llama.tokenize("the dog")) == "the dog"
    assert (llama.vocab_size, llama.eod) == (PIECES, 2)


def test_no_sentencepiece_model(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    path = tmp_path / "x.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"--tokenizer-model .*x\.model is no SentencePiece model"):
        GPTSentencePieceTokenizer(path)


def test_library_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "x.model").touch()
    with pytest.raises(ConfigError, match=r"pip install 'ee-llm\[data\]'"):
        build_tokenizer("Llama2Tokenizer", tmp_path / "x.model")
