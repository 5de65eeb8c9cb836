"""Token files, index arrays and samples against those recorded from Megatron, byte for byte.

Cases are found by their `case.json`: directories with `.idx` files (kind "data": the files, and `cache_*` with index
caches made from them), and files that hold named cases of `args` and `result` (kind "G": datasets, and
`cache_<name>`). Paths in them are relative to the golden directory.
"""

import hashlib
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.config.data import DataConfig
from megatron.data.build import build_datasets
from megatron.data.gpt import GPTDataset, SampleSpec
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.splits import SPLIT_NAMES, split_documents

DEFAULT_SEED = 1234  # --seed of the recorded commands
DESCRIPTION_KEYS = ("Data prefix", "Dataset name", "Number of samples", "Sequence length", "Random seed", "Split")


def is_named_case(value: object) -> bool:
    return isinstance(value, dict) and {"args", "result"} <= value.keys()


def discover(root: Path) -> dict[str, list[str]]:
    """Names of the cases of every fixture, relative to `root`."""
    found: dict[str, list[str]] = {"pair": [], "cache": [], "named": []}
    for case in sorted(root.glob("*/case.json")):
        content = json.loads(case.read_text())
        if isinstance(content, dict):
            found["named"] += [f"{case.parent.name}/{name}" for name, value in content.items() if is_named_case(value)]
        pairs = sorted(case.parent.glob("*.idx"))
        found["pair"] += [str(path.relative_to(root).with_suffix("")) for path in pairs]
        if pairs:
            found["cache"] += [str(path.relative_to(root)) for path in sorted(case.parent.glob("cache_*/*.dsc"))]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    default = Path(__file__).parents[2] / "../shared/golden"
    root = Path(metafunc.config.getoption("--golden", default=None) or default)
    for fixture, cases in discover(root).items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, cases or [None])  # with None, `golden_dir` gives the reason to skip


def needs(case: str | None) -> str:
    if case is None:
        pytest.skip("this golden directory has no case of this kind")
    return case


def read_description(text: str) -> dict[str, str]:
    """Prefix, name, … of a "GPT Dataset" description."""
    lines = text.splitlines()
    return {
        key: line.removeprefix(key + " ") for key in DESCRIPTION_KEYS for line in lines if line.startswith(key + " ")
    }


def npy_bytes(dsc: Path) -> dict[str, bytes]:
    """{array name: file content} of the cache that `dsc` belongs to."""
    return {path.name.removeprefix(dsc.stem): path.read_bytes() for path in dsc.parent.glob(f"{dsc.stem}_*.npy")}


def caches(directory: Path) -> dict[str, dict[str, bytes]]:
    """{description: arrays} of all caches in a directory."""
    return {dsc.read_text(): npy_bytes(dsc) for dsc in directory.glob("*.dsc")}


def arguments(text: str) -> tuple[IndexedDataset, range, SampleSpec]:
    """What `GPTDataset` needs to make the index that a description names."""
    fields = read_description(text)
    split = None if fields["Split"] == "None" else fields["Split"]
    indexed = IndexedDataset(fields["Data prefix"])
    documents = range(len(indexed))
    if split is not None:
        documents = split_documents(split, len(indexed))[SPLIT_NAMES.index(fields["Dataset name"])]
    numbers = [int(fields[key]) for key in ("Number of samples", "Sequence length", "Random seed")]
    return indexed, documents, SampleSpec(fields["Dataset name"], *numbers, split)


def test_pair_is_rewritten_byte_for_byte(golden_dir: Path, pair: str | None, tmp_path: Path) -> None:
    prefix = golden_dir / needs(pair)
    original = IndexedDataset(prefix)
    borders = original.document_indices.tolist()
    with IndexedWriter(tmp_path / "copy", original.dtype) as writer:
        for first, last in pairwise(borders):
            sequences = [original[i] for i in range(first, last)]
            tokens = np.concatenate(sequences) if sequences else []
            writer.add_document(tokens, [len(sequence) for sequence in sequences])
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"copy{ending}").read_bytes() == Path(f"{prefix}{ending}").read_bytes()


def test_cache_is_rebuilt_byte_for_byte(golden_dir: Path, cache: str | None, tmp_path: Path, monkeypatch) -> None:
    dsc = golden_dir / needs(cache)
    monkeypatch.chdir(golden_dir)
    text = dsc.read_text()
    dataset = GPTDataset(*arguments(text), str(tmp_path))
    assert dataset.description == text
    assert caches(tmp_path) == {text: npy_bytes(dsc)}


def test_named_case(golden_dir: Path, named: str | None, tmp_path: Path, monkeypatch) -> None:
    directory, name = needs(named).split("/")
    case = json.loads((golden_dir / directory / "case.json").read_text())[name]
    args, expected = case["args"], case["result"]
    monkeypatch.chdir(golden_dir)
    data = DataConfig(
        data_path=tuple(args.get("data_prefix") or ()),
        split=args.get("splits_string") or DataConfig().split,
        data_cache_path=str(tmp_path),
        **{f"{split}_data_path": tuple(args.get(split) or ()) for split in SPLIT_NAMES},
    )
    build = partial(build_datasets, data, tuple(args["n"]), args["seq"], args.get("seed", DEFAULT_SEED))
    for _ in range(2):  # built, then from the cache
        for split, dataset in zip(SPLIT_NAMES, build(), strict=True):
            if expected[split] is None:
                assert dataset is None
                continue
            assert dataset is not None and len(dataset) == expected[split]["len"]
            for index, item in expected[split]["items"].items():
                assert dataset[int(index)].tolist() == item
    assert caches(tmp_path) == caches(golden_dir / directory / f"cache_{name}")


def test_recorded_caches_are_used(golden_dir: Path, cache: str | None, tmp_path: Path, monkeypatch) -> None:
    """A cache written by Megatron is read, not built again (its md5 restored to that of the recorded text)."""
    dsc = golden_dir / needs(cache)
    monkeypatch.chdir(golden_dir)
    text = dsc.read_text()
    stem = hashlib.md5(text.encode()).hexdigest()
    (tmp_path / f"{stem}.dsc").write_text(text)
    for name, content in npy_bytes(dsc).items():
        (tmp_path / f"{stem}{name}").write_bytes(content)
    monkeypatch.setattr("megatron.data.gpt.build_doc_idx", lambda *_: pytest.fail("the cache was not used"))
    dataset = GPTDataset(*arguments(text), str(tmp_path))
    assert len(dataset[0]) == dataset.spec.seq_length + 1
