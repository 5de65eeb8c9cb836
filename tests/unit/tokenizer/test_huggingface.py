"""tokenizer.json alone, and directories that need transformers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from megatron.errors import ConfigError
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.gpt2 import END_OF_TEXT, GPT2BPETokenizer
from megatron.tokenizer.huggingface import AutoTokenizerAdapter, HuggingFaceTokenizer, load_huggingface


@pytest.fixture
def directory(gpt2_files: Path, tmp_path: Path) -> Path:
    """tokenizer.json and nothing else."""
    shutil.copy(gpt2_files / "tokenizer.json", tmp_path)
    return tmp_path


def test_directory_and_file_are_one(gpt2_files: Path) -> None:
    by_directory = build_tokenizer("HuggingFaceTokenizer", gpt2_files)
    by_file = build_tokenizer("HuggingFaceTokenizer", gpt2_files / "tokenizer.json")
    gpt2 = GPT2BPETokenizer(gpt2_files / "vocab.json", gpt2_files / "merges.txt")
    text = "the lazy dog\n  it's 42"
    assert by_directory.tokenize(text) == by_file.tokenize(text) == gpt2.tokenize(text)
    assert by_directory.fingerprint == by_file.fingerprint != gpt2.fingerprint
    assert (by_directory.vocab_size, by_directory.eod) == (gpt2.vocab_size, gpt2.eod)
    assert by_directory.files() == [gpt2_files / "tokenizer.json", gpt2_files / "tokenizer_config.json"]


def test_needs_no_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_huggingface(directory).tokenize("dog")


def test_end_of_text(directory: Path) -> None:
    assert load_huggingface(directory).detokenize([load_huggingface(directory).eod]) == END_OF_TEXT
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "!"}, "bos_token": "a"}))
    named = load_huggingface(directory)
    assert (named.pieces([named.eod]), named.pieces([named.bos or 0])) == (["!"], ["a"])
    config.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ConfigError, match="names eos_token '<nowhere>'"):
        load_huggingface(directory)
    config.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read"):
        load_huggingface(directory)


def test_no_end_of_text(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_huggingface(tmp_path)
    assert tokenizer.eos is None
    assert tokenizer.vocab_size == 6  # the largest id counts, not the number of entries
    with pytest.raises(ConfigError, match="names no end-of-text token"):
        _ = tokenizer.eod


def test_template_applies_truncation_does_not(directory: Path) -> None:
    path = str(directory / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(path)
    eos = library.token_to_id(END_OF_TEXT)
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, eos)]
    )
    library.enable_truncation(4)
    library.enable_padding(length=32)
    library.save(path)
    tokenizer = load_huggingface(directory)
    ids = tokenizer.tokenize("abcdefgh 123 !?")
    assert ids[0] == eos
    assert tokenizer.detokenize(ids[1:]) == "abcdefgh 123 !?"


def test_no_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json"):
        HuggingFaceTokenizer(tmp_path / "tokenizer.json")


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_huggingface(tmp_path)


@pytest.fixture
def slow_directory(gpt2_files: Path, tmp_path: Path) -> Path:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2_files / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT})
    )
    return tmp_path


def test_transformers_not_installed(slow_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'ee-llm\[hf\]'"):
        load_huggingface(slow_directory)


def test_directory_for_transformers(slow_directory: Path, gpt2_files: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = load_huggingface(slow_directory)
    assert isinstance(tokenizer, AutoTokenizerAdapter)
    gpt2 = GPT2BPETokenizer(gpt2_files / "vocab.json", gpt2_files / "merges.txt")
    text = "The lazy dog , it 's Größe"
    ids = tokenizer.tokenize(text)
    assert ids == gpt2.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.pieces(ids) == gpt2.pieces(ids)
    assert (tokenizer.vocab_size, tokenizer.eod) == (gpt2.vocab_size, gpt2.eod)
    assert {path.name for path in tokenizer.files()} == {"tokenizer_config.json", "vocab.json", "merges.txt"}


def test_directory_that_transformers_refuses(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_huggingface(tmp_path)
    assert "\n" not in str(caught.value)
