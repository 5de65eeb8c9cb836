"""GPT-2 BPE from vocab.json and merges.txt."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.tokenizer.gpt2 import END_OF_TEXT, GPT2BPETokenizer


@pytest.fixture(scope="module")
def tokenizer(gpt2_files: Path) -> GPT2BPETokenizer:
    return GPT2BPETokenizer(gpt2_files / "vocab.json", gpt2_files / "merges.txt")


def test_facts(tokenizer: GPT2BPETokenizer, gpt2_files: Path) -> None:
    vocab = json.loads((gpt2_files / "vocab.json").read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == len(vocab) == 320
    assert tokenizer.eod == tokenizer.eos == vocab[END_OF_TEXT]
    assert tokenizer.bos is None
    assert tokenizer.files() == [gpt2_files / "vocab.json", gpt2_files / "merges.txt"]


def test_merges_are_applied(tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["a", "b", "Ġ", "ab", "Ġab", END_OF_TEXT])}
    (tmp_path / "v").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "m").write_text("a b\nĠ ab\n", encoding="utf-8")  # the version line is optional
    tokenizer = GPT2BPETokenizer(tmp_path / "v", tmp_path / "m")
    assert tokenizer.tokenize("ab ab ba") == [3, 4, 2, 1, 0]
    assert tokenizer.pieces([3, 4, 2]) == ["ab", " ab", " "]


@given(st.text())
def test_round_trip(tokenizer: GPT2BPETokenizer, text: str) -> None:
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.tokenize_batch([text, "", text]) == [ids, [], ids]


def test_end_of_text_in_a_text_is_plain_text(tokenizer: GPT2BPETokenizer) -> None:
    assert tokenizer.eod not in tokenizer.tokenize(f"a{END_OF_TEXT}b")
    assert tokenizer.detokenize([tokenizer.eod]) == END_OF_TEXT


def test_part_of_a_character_shows_as_replacement(tokenizer: GPT2BPETokenizer) -> None:
    ids = tokenizer.tokenize("🜚")
    assert len(ids) > 1
    assert set(tokenizer.pieces(ids)) == {"\ufffd"}
    assert tokenizer.detokenize(ids) == "🜚"


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("{", "", "--vocab-file .* cannot be read"),
        ("[1]", "", "--vocab-file .* JSON object"),
        ('{"a": "x"}', "", "--vocab-file .* JSON object"),
        ('{"a": 0}', "", "--vocab-file .* has no <|endoftext|>"),
        ('{"a": 0, "b": 1, "<|endoftext|>": 2}', "#version: 0.2\na b\n", "--merge-file .*, line 2: 'ab' is not in"),
        ('{"a": 0, "<|endoftext|>": 1}', "a\n", "--merge-file .*, line 1: expected two tokens"),
    ],
)
def test_broken_files(tmp_path: Path, vocab: str, merges: str, message: str) -> None:
    (tmp_path / "v").write_text(vocab)
    (tmp_path / "m").write_text(merges)
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        GPT2BPETokenizer(tmp_path / "v", tmp_path / "m")


def test_binary_merges(tmp_path: Path, gpt2_files: Path) -> None:
    (tmp_path / "m").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="--merge-file"):
        GPT2BPETokenizer(gpt2_files / "vocab.json", tmp_path / "m")
