"""Documents out of JSON lines, text and Parquet, and what is said of those that can't be read."""

import gzip
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.text_files import (
    BadRecord,
    Document,
    JsonLines,
    check_keys,
    find_inputs,
    input_size,
    read_batches,
)
from megatron.errors import ConfigError, DataError


def read(paths: Sequence[Path], keys: Sequence[str] = ("text",), batch_bytes: int = 64) -> list[Document | BadRecord]:
    return [item for batch in read_batches(paths, keys, batch_bytes) for item in batch.documents(keys)]


def texts(items: Sequence[Document | BadRecord]) -> list:
    assert all(isinstance(item, Document) for item in items)
    return [item.texts["text"] for item in items]


def write_jsonl(path: Path, values: Sequence[object]) -> Path:
    content = "".join(json.dumps({"text": value}, ensure_ascii=False) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@given(st.lists(st.text()))
def test_json_lines_round_trip(values: list[str]) -> None:
    lines = [json.dumps({"text": value, "other": 1}).encode() for value in values]
    items = list(JsonLines(0, "x", 1, lines).documents(["text"]))
    assert texts(items) == values


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a"])
@pytest.mark.parametrize("batch_bytes", [1, 50, 10**6])
def test_json_lines_in_any_batches(tmp_path: Path, name: str, batch_bytes: int) -> None:
    values = ["one", "", "zwölf 東京 \u2028 \r\n", ["a", "b"], "x" * 200]
    path = write_jsonl(tmp_path / name, values)
    assert texts(read([path], batch_bytes=batch_bytes)) == values
    consumed = [batch.consumed for batch in read_batches([path], ["text"], batch_bytes)]
    assert sum(consumed) == input_size([path])


def test_marks_blank_lines_and_a_missing_last_line_break(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert texts(read([path])) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nope", r"not JSON: Expecting value \(column 1\)"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 10\)"),
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"txt": "x"}', "no key 'text'"),
        (b'{"text": null}', "neither a text nor a list of texts"),
        (b'{"text": ["a", 1]}', "neither a text nor a list of texts"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON|neither"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    first, bad, last = read([path], batch_bytes=1)
    assert texts([first, last]) == ["first", "last"]
    assert isinstance(bad, BadRecord)
    assert bad.where == f"{path}:3"
    assert re.search(reason, bad.reason)


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    contents = {"a.txt": "first\nsecond\n", "b.txt": "", "c.txt": "größer", "d.txt.gz": "packed"}
    for name, content in contents.items():
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "e.txt").write_bytes(b"ab\xff")
    paths = find_inputs([str(tmp_path)])
    *good, bad = read(paths, batch_bytes=8)
    assert texts(good) == list(contents.values())
    assert str(bad) == f"{tmp_path}/e.txt: not UTF-8 (byte 2)"
    assert sum(batch.consumed for batch in read_batches(paths, ["text"], 8)) == input_size(paths)
    check_keys(paths, ["text"])
    with pytest.raises(ConfigError, match=r"a\.txt is one text without keys"):
        check_keys(paths, ["text", "title"])


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [f"document {i} " + "x" * (i % 50) for i in range(300)]
    values[7] = None
    table = pyarrow.table({"text": values, "id": list(range(300)), "parts": [["a", "b"]] * 300})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=64)

    items = read([path], batch_bytes=1000)
    assert str(items[7]) == f"{path}:8: 'text' is neither a text nor a list of texts"
    assert texts(items[:7] + items[8:]) == values[:7] + values[8:]
    assert texts(read([path], batch_bytes=10**9)[8:]) == values[8:]
    assert read([path], ["parts"])[0].texts == {"parts": ["a", "b"]}
    assert sum(batch.consumed for batch in read_batches([path], ["text"], 1000)) == input_size([path])
    assert len(list(read_batches([path], ["text"], 1000))) > 5

    with pytest.raises(DataError, match="no column 'body'; --json-keys may name: text, id, parts"):
        read([path], ["body"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        read([path])


def test_truncated_and_foreign_gz(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", [os.urandom(50).hex() for _ in range(100)])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is truncated"):
        read([path])
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        read([path])


def test_find_inputs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "deep/c.parquet", "deep/d.json.gz", ".hidden/e.txt", "._a.txt", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    offered = [tmp_path / name for name in ("a.txt", "b.jsonl", "deep/c.parquet", "deep/d.json.gz")]
    assert find_inputs([str(tmp_path)]) == offered
    assert find_inputs([str(tmp_path / "*.jsonl"), str(tmp_path / "a.txt")]) == [offered[1], offered[0]]
    assert find_inputs([str(tmp_path / "**/*.parquet"), str(tmp_path / "deep")]) == offered[2:]
    assert find_inputs([str(tmp_path / "notes.md")]) == [tmp_path / "notes.md"]  # asked for: taken as JSON lines
    with pytest.raises(ConfigError, match=r"none\*: no such file"):
        find_inputs([str(tmp_path / "none*")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no \.jsonl, .* file in it"):
        find_inputs([str(tmp_path / "empty")])
    (tmp_path / "x.jsonl.zst").touch()
    with pytest.raises(ConfigError, match=r"\.zst can't be read"):
        find_inputs([str(tmp_path / "x.jsonl.zst")])


def test_name_with_glob_characters(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a[1].jsonl", ["x"])
    assert find_inputs([str(path)]) == [path]


def test_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b'{"text": "a"}\n{"text": "b"}\n',))
    writer.start()
    assert texts(read(find_inputs([str(path)]))) == ["a", "b"]
    writer.join()
