"""Documents to token files: what is written, in which order, and what happens to bad input."""

import itertools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.cli.preprocess_data import main
from megatron.config.data import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import EncodeSettings, PreprocessSettings, Summary, preprocess
from megatron.errors import ConfigError, DataError, EELLMError
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.gpt2 import END_OF_TEXT
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe

NULL = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100)
ROOT = Path(__file__).resolve().parents[3]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(tmp_path: Path, *inputs: Path, encode: EncodeSettings | None = None, **settings: object) -> Summary:
    made = PreprocessSettings(inputs, str(tmp_path / "out" / "x"), encode or EncodeSettings(NULL), **settings)
    return preprocess(made, lambda result: None)


def documents(prefix: str | Path) -> list[list[list[int]]]:
    """Documents as lists of sequences."""
    data = IndexedDataset(prefix)
    borders = [int(i) for i in data.document_indices]
    return [[data[i].tolist() for i in range(start, end)] for start, end in itertools.pairwise(borders)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    directory = tmp_path_factory.mktemp("bpe")
    library = train_byte_level_bpe(["the lazy dog naps\n" * 9], 280)
    for name, content in tokenizer_files(library, END_OF_TEXT).items():
        (directory / name).write_text(content, encoding="utf-8")
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))


def test_documents_and_end_of_document(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1 2 3"}, {"text": ""}, {"text": ["4", "", "5 6"]}])
    summary = run(tmp_path, path)
    prefix = tmp_path / "out" / "x_text_document"
    assert documents(prefix) == [[[1, 2, 3]], [], [[4], [5, 6]]]
    assert summary == Summary(3, 6, 0, [f"{prefix}.bin", f"{prefix}.idx"])
    assert IndexedDataset(prefix).dtype == np.uint16

    run(tmp_path, path, encode=EncodeSettings(NULL, append_eod=True))
    assert documents(prefix) == [[[1, 2, 3, 100]], [], [[4], [5, 6, 100]]]


def test_large_vocabulary_is_int32(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1 69999"}])
    for size, dtype in ((65498, np.uint16), (65499, np.int32), (70000, np.int32)):
        text = path if size == 70000 else write_lines(tmp_path / "b.jsonl", [{"text": "1"}])
        run(tmp_path, text, encode=EncodeSettings(TokenizerConfig("NullTokenizer", vocab_size=size)))
        assert IndexedDataset(tmp_path / "out" / "x_text_document").dtype == dtype
    assert documents(tmp_path / "out" / "x_text_document") == [[[1, 69999]]]


def test_every_key_is_complete_and_aligned(tmp_path: Path) -> None:
    records = [{"a": "1", "b": "2 3"}, {"a": "4"}, {"a": "x", "b": "5"}, {"b": "6", "a": ""}]
    path = write_lines(tmp_path / "a.jsonl", records)
    summary = run(tmp_path, path, encode=EncodeSettings(NULL, keys=("a", "b")))
    assert documents(tmp_path / "out" / "x_a_document") == [[[1]], []]
    assert documents(tmp_path / "out" / "x_b_document") == [[[2, 3]], [[6]]]
    assert (summary.documents, summary.tokens, summary.skipped, len(summary.files)) == (2, 4, 2, 4)


def test_unicode(tmp_path: Path, bpe: TokenizerConfig) -> None:
    values = ["größer 東京 🜚", "\u0000\u2028\r\n\t", "the lazy dog"]
    path = write_lines(tmp_path / "a.jsonl", [{"text": value} for value in values])
    run(tmp_path, path, encode=EncodeSettings(bpe))
    tokenizer = build_tokenizer(**vars(bpe))
    written = documents(tmp_path / "out" / "x_text_document")
    assert [tokenizer.detokenize(ids) for (ids,) in written] == values


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """61 records of several kinds, in batches of about ten."""
    records: list[object] = [{"text": f"the dog {'naps ' * (i % 7)}{i}"} for i in range(60)]
    records[20] = {"text": ""}
    records[21] = {"text": ["dog", "lazy " * 5]}
    records.insert(30, "broken")
    return write_lines(tmp_path / "corpus.jsonl", records)


def test_workers_and_sequential_partitions_change_nothing(tmp_path: Path, corpus: Path, bpe: TokenizerConfig) -> None:
    encode = EncodeSettings(bpe, append_eod=True)
    one = run(tmp_path / "1", corpus, encode=encode)
    whole = contents(tmp_path / "1" / "out")
    assert (one.documents, one.skipped) == (60, 1)
    seen: list[int] = []
    prefix = str(tmp_path / "2" / "out" / "x")
    two = PreprocessSettings((corpus,), prefix, encode, workers=2, batch_bytes=300)
    assert preprocess(two, lambda result: seen.append(result.documents)).tokens == one.tokens
    assert len(seen) > 6
    assert contents(tmp_path / "2" / "out") == whole
    run(tmp_path / "3", corpus, encode=encode, workers=2, partitions=2, keep_sequential_samples=True)
    assert contents(tmp_path / "3" / "out") == whole


@pytest.mark.parametrize("partitions", [2, 3])
def test_partitions_take_turns(tmp_path: Path, corpus: Path, bpe: TokenizerConfig, partitions: int) -> None:
    encode = EncodeSettings(bpe)
    run(tmp_path / "1", corpus, encode=encode)
    in_order = documents(tmp_path / "1" / "out" / "x_text_document")
    made = PreprocessSettings(
        (corpus,), str(tmp_path / "2" / "x"), encode, workers=partitions, partitions=partitions, batch_bytes=300
    )
    preprocess(made, lambda result: None)
    dealt = [document for part in range(partitions) for document in in_order[part::partitions]]
    assert documents(tmp_path / "2" / "x_text_document") == dealt
    assert set(contents(tmp_path / "2")) == {"x_text_document.bin", "x_text_document.idx"}


def test_text_and_parquet_inputs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.txt").write_text("1\n2 3\n")
    parquet.write_table(pyarrow.table({"text": ["4 5", ""]}), tmp_path / "b.parquet")
    write_lines(tmp_path / "c.jsonl", [{"text": "6"}])
    run(tmp_path, *(tmp_path / name for name in ("a.txt", "b.parquet", "c.jsonl")))
    assert documents(tmp_path / "out" / "x_text_document") == [[[1, 2, 3]], [[4, 5]], [], [[6]]]


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1"}, {"text": "1 100000"}])
    results = []
    settings = PreprocessSettings((path,), str(tmp_path / "x"), EncodeSettings(NULL))
    assert preprocess(settings, results.append).skipped == 1
    assert str(results[0].bad[0]).startswith(f"{path}:2: 'text': token id 100000")


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_stops_and_leaves_old_files(tmp_path: Path, workers: int) -> None:
    good = write_lines(tmp_path / "good.jsonl", [{"text": "1"}])
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "2"}, "nope", {"text": 1}])
    run(tmp_path, good)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON.*--strict"):
        run(tmp_path, good, bad, strict=True, workers=workers)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("records", "reason"), [([""], "empty"), (["x", "y"], r"2 records.*a\.jsonl:1: not JSON")])
def test_no_document_writes_nothing(tmp_path: Path, records: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=f"holds no document .*{reason}"):
        run(tmp_path, write_lines(tmp_path / "a.jsonl", records))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 3, "partitions": 2}, r"--workers \(3\) must be a multiple of --partitions \(2\)"),
        ({"workers": 0}, "at least 1"),
        ({"encode": EncodeSettings(NULL, keys=("a", "a"))}, "names a key twice"),
        ({"encode": EncodeSettings(TokenizerConfig("Nope"))}, "--tokenizer-type Nope is unknown"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, path, **settings)
    assert not (tmp_path / "out").exists()


def die(*_: object) -> None:
    os._exit(1)


def test_a_dying_worker_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    monkeypatch.setattr("megatron.data.preprocess._encode_in_worker", die)
    with pytest.raises(EELLMError, match="worker process died"):
        run(tmp_path, path, workers=2)
    assert list((tmp_path / "out").iterdir()) == []


class FakePunkt:
    """Splits at ". " as NLTK's class would, and knows one language."""

    def __init__(self, language: str) -> None:
        if language == "klingon":
            raise LookupError("no data")
        if language != "english":
            raise ValueError("bad name")

    def span_tokenize(self, text: str) -> Iterator[tuple[int, int]]:
        start = 0
        while start < len(text):
            end = text.find(".", start) + 1 or len(text.rstrip())
            yield start, end
            start = end + len(text[end:]) - len(text[end:].lstrip())


@pytest.fixture
def fake_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    punkt = types.ModuleType("nltk.tokenize.punkt")
    punkt.PunktTokenizer = FakePunkt  # type: ignore[attr-defined]
    for name in ("nltk", "nltk.tokenize"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", punkt)


@pytest.mark.usefixtures("fake_nltk")
@pytest.mark.parametrize(
    ("keep_newlines", "sentences"),
    [(False, ["the dog.", "lazy naps.", "end"]), (True, ["the dog.\n\n", "lazy naps. ", "end"])],
)
def test_split_sentences(tmp_path: Path, bpe: TokenizerConfig, keep_newlines: bool, sentences: list[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "the dog.\n\nlazy naps. end"}, {"text": ""}])
    encode = EncodeSettings(bpe, split_sentences=True, keep_newlines=keep_newlines)
    run(tmp_path, path, encode=encode)
    first, second = documents(tmp_path / "out" / "x_text_sentence")
    tokenizer = build_tokenizer(**vars(bpe))
    assert [tokenizer.detokenize(ids) for ids in first] == sentences
    assert second == []


@pytest.mark.usefixtures("fake_nltk")
@pytest.mark.parametrize(("language", "message"), [("klingon", "no Punkt data for --lang klingon"), ("", "--lang")])
def test_language_without_data(tmp_path: Path, language: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, encode=EncodeSettings(NULL, split_sentences=True, language=language))


def test_a_corpus_of_empty_documents_is_refused(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / name, [{"text": ""}, {"text": []}]) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match=r"a\.jsonl \(and 1 more\): all documents are empty \(read: 4, unreadable: 0\)"):
        run(tmp_path, *paths, encode=EncodeSettings(NULL, append_eod=True))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in paths]


@pytest.mark.parametrize(("prefix", "message"), [("", "is empty"), ("{there}", "is a directory: add a name")])
def test_no_prefix(tmp_path: Path, prefix: str, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    settings = PreprocessSettings((path,), prefix.format(there=tmp_path), EncodeSettings(NULL))
    with pytest.raises(ConfigError, match=f"--output-prefix .*{message}"):
        preprocess(settings, lambda result: None)


def test_nltk_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ConfigError, match="needs the nltk library"):
        run(tmp_path, encode=EncodeSettings(NULL, split_sentences=True))


Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    def make(path: Path, *more: str) -> list[str]:
        flags = ["--tokenizer-type", "NullTokenizer", "--workers", "1", "--output-prefix", str(tmp_path / "x")]
        return ["--input", str(path), *flags, *more]

    return make


def test_command_line(tmp_path: Path, arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": "1 2"}, *["broken"] * 7, {"text": "785"}]
    path = write_lines(tmp_path / "a.jsonl", records)
    assert main(arguments(path, "--append-eod", "--log-interval", "1")) == 0
    shown = capsys.readouterr()
    prefix = tmp_path / "x_text_document"
    assert shown.out.startswith("2 documents, 5 tokens, ")
    assert shown.out.endswith(f"7 unreadable records skipped; wrote {prefix}.bin {prefix}.idx\n")
    assert shown.err.count("skipped") == 5
    assert f"skipped {path}:2: not JSON" in shown.err
    assert "... and 2 more unreadable records" in shown.err
    assert "Processed 2 documents (" in shown.err
    assert documents(prefix) == [[[1, 2, 786]], [[785, 786]]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strict"], "error: {path}:2: not JSON"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "error: GPT2BPETokenizer needs --vocab-file"),
        (["--input", "{path}.none"], "error: --input {path}.none: no such file"),
    ],
)
def test_command_line_errors(
    tmp_path: Path, arguments: Arguments, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1 2"}, "broken"])
    assert main(arguments(path, *(word.format(path=path) for word in more))) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(message.format(path=path))
    assert not list(tmp_path.glob("x*"))


def test_interrupt(
    tmp_path: Path, arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path = write_lines(tmp_path / "a.jsonl", [{"text": "1 2"}])
    monkeypatch.setattr("megatron.data.preprocess.Encoder.encode_batch", interrupted)
    assert main(arguments(path)) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("tool", ["preprocess_data.py", "train_tokenizer.py"])
def test_tools_run_from_anywhere(tmp_path: Path, tool: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {tool}")
