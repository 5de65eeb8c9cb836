"""tools/merge_datasets.py: pairs of a directory joined in the order of their names."""

from pathlib import Path

import numpy as np
import pytest

from megatron.cli.merge_datasets import main
from megatron.data.indexed import IndexedDataset, IndexedWriter


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def run(directory: Path, output: Path) -> int:
    return main(["--input", str(directory), "--output-prefix", str(output)])


def test_merge_equals_writing_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = tmp_path / "parts"
    write(parts / "b", [[4], [], [5, 6]])
    write(parts / "a", [[1, 2], [3]])
    (parts / "readme.txt").write_text("not data")
    write(tmp_path / "whole", [[1, 2], [3], [4], [], [5, 6]])
    assert run(parts, tmp_path / "merged") == 0
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"merged{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert capsys.readouterr().out.startswith("5 documents in")


def test_large_pairs_are_copied_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.indexed.MERGE_CHUNK", 8)
    write(tmp_path / "parts" / "a", [list(range(100))], np.int32)
    assert run(tmp_path / "parts", tmp_path / "merged") == 0
    assert IndexedDataset(tmp_path / "merged")[0].tolist() == list(range(100))


@pytest.mark.parametrize("case", ["nothing", "empty", "half", "dtypes", "onto itself"])
def test_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts, output = tmp_path / "parts", tmp_path / "merged"
    if case != "nothing":
        parts.mkdir()
    if case in ("half", "dtypes", "onto itself"):
        write(parts / "a", [[1]])
        write(parts / "b", [[1]], np.int32 if case == "dtypes" else np.uint16)
    if case == "half":
        (parts / "b.bin").unlink()
    if case == "onto itself":
        output = parts / "a"
    reasons = {
        "nothing": "is not a directory",
        "empty": "holds no .bin/.idx pair",
        "half": "b has only one of its .bin and .idx files",
        "dtypes": "b.idx holds int32 tokens and cannot join uint16 ones",
        "onto itself": "choose another",
    }
    assert run(parts, output) == 2
    assert reasons[case] in capsys.readouterr().err
    assert not list(tmp_path.glob("merged*"))
