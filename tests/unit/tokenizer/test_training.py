"""Training a byte-level BPE, and its command line."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron.cli.train_tokenizer import main
from megatron.errors import ConfigError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.gpt2 import END_OF_TEXT
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe

CODE = "class Box:\n    def area(self):\n        if self.x:\n            return 1\n\n        return 0\n"


def load(library: tokenizers.Tokenizer, directory: Path) -> Tokenizer:
    for name, content in tokenizer_files(library, END_OF_TEXT).items():
        (directory / name).write_text(content, encoding="utf-8")
    return build_tokenizer("HuggingFaceTokenizer", directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(train_byte_level_bpe([CODE] * 5, 400), tmp_path_factory.mktemp("bpe"))


@given(st.text())
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@given(st.text(alphabet=" \n\t\r\u00a0\u2028ab'1<|>endoftext"))
def test_round_trip_of_white_space(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_special_token_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.tokenize(f"a {END_OF_TEXT}  b")
    assert ids.count(tokenizer.eod) == 1
    assert tokenizer.detokenize(ids) == f"a {END_OF_TEXT}  b"


def test_indentation_is_one_token(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces(tokenizer.tokenize(CODE))
    assert {"\n    ", "\n        ", "\n            ", "\n\n        "} <= set(pieces)
    assert "return" in pieces


def test_without_merging_white_space_it_is_gpt2(tmp_path: Path) -> None:
    library = train_byte_level_bpe([CODE] * 5, 300, merge_whitespace=False)
    tokenizer = load(library, tmp_path)
    gpt2 = build_tokenizer("GPT2BPETokenizer", vocab_file=tmp_path / "vocab.json", merge_file=tmp_path / "merges.txt")
    assert gpt2.tokenize(CODE) == tokenizer.tokenize(CODE)
    assert (gpt2.eod, gpt2.vocab_size) == (tokenizer.eod, tokenizer.vocab_size)
    assert "\n        " not in tokenizer.pieces(tokenizer.tokenize(CODE))


def test_gpt2_files_only_where_they_say_the_same() -> None:
    merged = train_byte_level_bpe([CODE], 300)
    assert set(tokenizer_files(merged, END_OF_TEXT)) == {"tokenizer.json", "tokenizer_config.json"}
    other_end = train_byte_level_bpe([CODE], 300, merge_whitespace=False, special_tokens=["<eos>"])
    files = tokenizer_files(other_end, "<eos>")
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<eos>"


def test_deterministic() -> None:
    texts = [CODE, "ab ba abba " * 3, "größer 東京 "] * 4
    assert train_byte_level_bpe(texts, 350).to_str() == train_byte_level_bpe(texts, 350).to_str()


def test_min_frequency() -> None:
    text = ["ab ab ab cd"]
    assert train_byte_level_bpe(text, 400, min_frequency=3).get_vocab_size() < (
        train_byte_level_bpe(text, 400, min_frequency=1).get_vocab_size()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "--vocab-size must be at least 257"),
        ({"special_tokens": []}, "--special-tokens needs at least one"),
        ({"special_tokens": ["<a>", "<a>"]}, "each only once"),
        ({"special_tokens": ["éé"]}, "printable ASCII"),
        ({"min_frequency": 0}, "--min-frequency"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_byte_level_bpe(["a"], **{"vocab_size": 300, **settings})


def test_transformers_reads_it(tokenizer: Tokenizer) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    theirs = auto.from_pretrained(str(tokenizer.files()[0].parent), local_files_only=True)
    assert theirs.encode(CODE) == tokenizer.tokenize(CODE)
    assert theirs.decode(theirs.encode(CODE)) == CODE
    assert theirs.eos_token_id == tokenizer.eod


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text(CODE)
    lines = [json.dumps({"body": CODE}), "broken", json.dumps({"body": [CODE, "more"]})]
    (corpus / "b.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out"
    arguments = ["--input", str(corpus), "--json-keys", "body", "--output", str(output), "--vocab-size", "270"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "270 entries from 3 documents, 1 unreadable records skipped" in shown.out
    assert f"{corpus}/b.jsonl:2: not JSON" in shown.err
    first = (output / "tokenizer.json").read_bytes()
    assert not (output / "vocab.json").exists()

    assert main([*arguments, "--no-merge-whitespace"]) == 0
    assert (output / "merges.txt").is_file()
    assert main(arguments) == 0
    assert (output / "tokenizer.json").read_bytes() == first
    assert "vocab.json is of an earlier training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "vocab_size", "message"),
    [
        ("a.txt", "a", "100", "error: --vocab-size must be at least 257"),
        ("a.jsonl", "", "300", "error: --input holds no document"),
        ("a.jsonl", "broken\n", "300", "error: --input holds no document"),
        ("a.txt.zst", "", "300", "can't be read; decompress it"),
    ],
)
def test_command_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, vocab_size: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    output = tmp_path / "out"
    assert main(["--input", str(tmp_path / name), "--output", str(output), "--vocab-size", vocab_size]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
