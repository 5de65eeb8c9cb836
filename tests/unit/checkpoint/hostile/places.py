"""Every place that reads a file: the good file there, what reads it, and how it is spoilt."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from megatron.checkpoint import manifest, megatron_legacy, native
from megatron.checkpoint.find import TRACKER, recognise
from megatron.checkpoint.state import RunState
from megatron.config.load import load
from megatron.data.gpt import GPTDataset, SampleSpec
from megatron.data.indexed import IndexedDataset
from megatron.data.text_files import read_batches
from megatron.testing.corpus import VOCAB
from megatron.tokenizer.build import build_tokenizer
from tests.unit.checkpoint.hostile.watch import Outcome
from tests.unit.checkpoint.pickles import (
    archive,
    before_1_6,
)  # fmt: skip

MEGABYTES = 200
NATIVE, LEGACY, DATA = "native/iter_0000005", "megatron/iter_0000007", "data"
WORDS, DIRECTORY = "words", "words/directory"


@dataclass(frozen=True)
class Place:
    """A file of the good set, and what reads it; both from the set's directory on.

    wrap: makes the file around a pickle; after: makes what lies beside fit again; named: what an error names at least,
    if not the file; reads_on: a bad file counts as missing there.
    """

    file: str
    read: Callable[[Path], object]
    wrap: Callable[[bytes], bytes] = bytes
    after: Callable[[Path], None] = lambda root: None
    named: str = ""
    reads_on: bool = False


def fit_index(root: Path) -> None:
    """Make the index say that the first tensor takes all of its file."""
    tensors = root / NATIVE / "tensors"
    metadata = pickle.loads((tensors / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, (tensors / place.relative_path).stat().st_size
    (tensors / ".metadata").write_bytes(pickle.dumps(metadata))


def fit_hashes(root: Path) -> None:
    """Make the facts vouch for the tokenizer's files as they are."""
    facts = json.loads((root / NATIVE / "facts.json").read_text())
    facts["tokenizer_sha256"] = {
        path.name: sha256(path.read_bytes()).hexdigest() for path in (root / NATIVE / "tokenizer").iterdir()
    }
    (root / NATIVE / "facts.json").write_text(json.dumps(facts))


def seal(directory: Path) -> None:
    """Make the manifest vouch for all that lies there."""
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").write_bytes(manifest.build(directory, lambda path: None, {}))


def read_native(root: Path) -> RunState:
    return native.read(root / NATIVE)


def read_whole(root: Path) -> RunState:
    return native.read(recognise(root / "native").directory)


def read_legacy(root: Path) -> RunState:
    return megatron_legacy.read(root / LEGACY)


def read_own_words(root: Path) -> None:
    native.read_facts(root / NATIVE)
    files = native.tokenizer_files(root / NATIVE)
    use(build_tokenizer("GPT2BPETokenizer", vocab_file=files["vocab.json"], merge_file=files["merges.txt"]))


def use(tokenizer) -> None:
    assert tokenizer.vocab_size < 10_000 and tokenizer.detokenize(tokenizer.tokenize("the cat"))


def read_gpt2(root: Path) -> None:
    words = root / WORDS
    use(build_tokenizer("GPT2BPETokenizer", vocab_file=words / "vocab.json", merge_file=words / "merges.txt"))


def read_tokenizer(kind: str, path: str) -> Callable[[Path], None]:
    return lambda root: use(build_tokenizer(kind, root / WORDS / path))


def read_config(name: str) -> Callable[[Path], object]:
    return lambda root: load(["--config", str(root / "config" / name)])


def read_corpus(root: Path) -> GPTDataset:
    spec = SampleSpec("train", 50, 24, 1, None)
    return GPTDataset(IndexedDataset(str(root / DATA / "corpus")), range(60), spec, vocab_size=VOCAB + 1)


def read_cached(root: Path) -> None:
    """What a damaged cache is replaced by must be what was there; the files' names depend on where they lie."""
    dataset = read_corpus(root)
    assert [int(sum(dataset[i])) for i in range(3)] == json.loads((root / DATA / "sums.json").read_text())


def read_texts(name: str) -> Callable[[Path], object]:
    return lambda root: list(read_batches([root / "texts" / name], ["text"]))


CACHE = f"{DATA}/index-cache/*"
PLACES = {
    "megatron": Place(f"{LEGACY}/mp_rank_00/model_optim_rng.pt", read_legacy, archive, named=LEGACY),
    "megatron, before torch 1.6": Place(f"{LEGACY}/mp_rank_00/model_optim_rng.pt", read_legacy, before_1_6),
    "megatron, bare": Place(f"{LEGACY}/mp_rank_00/model_optim_rng.pt", read_legacy),
    "megatron, second rank": Place(f"{LEGACY}/mp_rank_01/model_optim_rng.pt", read_legacy, archive),
    "index": Place(f"{NATIVE}/tensors/.metadata", read_native, named=NATIVE),
    "tensors": Place(f"{NATIVE}/tensors/__0_00.distcp", read_native, archive, fit_index),
    "tensors, before torch 1.6": Place(f"{NATIVE}/tensors/__0_00.distcp", read_native, before_1_6, fit_index),
    "tensors, bare": Place(f"{NATIVE}/tensors/__0_00.distcp", read_native, after=fit_index),
    "facts": Place(f"{NATIVE}/facts.json", read_own_words, named=NATIVE),
    "manifest": Place(f"{NATIVE}/manifest.json", read_whole, named=NATIVE),
    "tracker": Place(f"native/{TRACKER}", read_whole, reads_on=True),
    "own tokenizer": Place(f"{NATIVE}/tokenizer/vocab.json", read_own_words, after=fit_hashes),
    "config.yaml": Place("config/config.yaml", read_config("config.yaml")),
    "config.json": Place("config/config.json", read_config("config.json")),
    "vocab.json": Place(f"{WORDS}/vocab.json", read_gpt2),
    "merges.txt": Place(f"{WORDS}/merges.txt", read_gpt2),
    "tokenizer.json": Place(f"{WORDS}/tokenizer.json", read_tokenizer("HuggingFaceTokenizer", "tokenizer.json")),
    "its settings": Place(f"{WORDS}/tokenizer_config.json", read_tokenizer("HuggingFaceTokenizer", "")),
    "directory": Place(f"{DIRECTORY}/vocab.json", read_tokenizer("HuggingFaceTokenizer", "directory"), named=DIRECTORY),
    "directory, settings": Place(
        f"{DIRECTORY}/tokenizer_config.json", read_tokenizer("HuggingFaceTokenizer", "directory"), named=DIRECTORY
    ),
    "sentencepiece": Place(f"{WORDS}/words.model", read_tokenizer("SentencePieceTokenizer", "words.model")),
    ".idx": Place(f"{DATA}/corpus.idx", read_corpus, named=f"{DATA}/corpus"),
    "sample index": Place(f"{CACHE}_sample_idx.npy", read_cached, reads_on=True),
    "document index": Place(f"{CACHE}_doc_idx.npy", read_cached, reads_on=True),
    "shuffle index": Place(f"{CACHE}_shuffle_idx.npy", read_cached, reads_on=True),
    "index description": Place(f"{CACHE}.dsc", read_cached, reads_on=True),
    "corpus.parquet": Place("texts/corpus.parquet", read_texts("corpus.parquet")),
    "corpus.jsonl.gz": Place("texts/corpus.jsonl.gz", read_texts("corpus.jsonl.gz")),
}


def link_to_copy(path: Path, content: bytes) -> None:
    """The same content, size and hash, but outside."""
    outside = path.parents[4] / "outside"
    outside.write_bytes(content)
    path.unlink(missing_ok=True)
    path.symlink_to(outside)


def spoilt(good: Path, tmp_path: Path, place: Place, make: Callable[[Path], object]) -> Path:
    """A copy of the part of the good set that `place` needs, in which `make` was let loose on its file."""
    part = Path(place.file).parts[0]
    shutil.copytree(good / part, tmp_path / part)
    if part == DATA:  # caches are named after where the data lie
        shutil.rmtree(tmp_path / DATA / "index-cache")
        read_corpus(tmp_path)
    (path,) = tmp_path.glob(place.file)
    make(path)
    place.after(tmp_path)
    return tmp_path


def assert_nothing_done(outcome: Outcome, place: Place, root: Path, what: str) -> None:
    """Nothing but reading; where that is the rule, writing a cache anew."""
    cache = str(root / DATA / "index-cache")
    assert [event for event in outcome.done if not (place.reads_on and cache in event)] == [], what
    assert not outcome.error.startswith("SIG"), what


def assert_refused(outcome: Outcome, place: Place, root: Path, what: str) -> None:
    """Refused by name, or passed over where that is the rule; and nothing else was done, nor much memory taken."""
    assert_nothing_done(outcome, place, root, what)
    assert outcome.megabytes < MEGABYTES, what
    if place.reads_on:
        assert not outcome.error, (what, outcome)
    else:
        assert outcome.ours and (place.named or Path(place.file).name) in outcome.message, (what, outcome)
        assert "weights_only" not in outcome.message  # torch's advice to read without it
