"""Hostile files in every place that reads one: nothing in them runs, each is refused by name, in bounded time and
memory (row R13).

A child process does the reading and notes what else it does: processes it starts, code it runs, files it changes.
"""

import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint import manifest, megatron_legacy, native
from megatron.checkpoint.find import TRACKER, recognise
from megatron.checkpoint.state import RunState
from megatron.cli import generate, pretrain, verify_checkpoint
from megatron.config.load import load, save_config
from megatron.data.gpt import GPTDataset, SampleSpec
from megatron.data.indexed import HEADER, MAGIC, IndexedDataset
from megatron.data.text_files import read_batches
from megatron.errors import EELLMError
from megatron.testing.corpus import VOCAB, training_flags, write_corpus
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe
from tests.unit.checkpoint.test_safe import (
    ARCHIVES,
    BODIES,
    DEEP,
    P2,
    PAYLOADS,
    PICKLE_BOMBS,
    Trap,
    archive,
    before_1_6,
    doubled,
    npy,
    pickled,
    saved,
    word,
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches a forked process through Linux's /proc")
SECONDS, MEGABYTES = 10, 200
# What is known to be met by no error of ours, or not soon: nothing of it runs. A line a place, then its continuation.
KNOWN = r"""
payloads: directory; tensors, bare; tensors, before torch 1.6; tensors
config.yaml: lists that double; lists that double, of a blend; mappings merged twice each; no truth; no number; no
    fraction; no date
directory: nested deeply; mappings nested deeply; a number of 5000 digits; a list; null; no text; nothing
directory, settings: nested deeply; null; a list; a class that is a number; a class that is itself
document index: half a zip
facts: an iteration of 400 digits; tokenizer file '/etc/passwd'; tokenizer file 'aaaaaaaaaaaaaaaaaaaa'
facts, strange: a link to nowhere; a link to itself; a link to its copy
generate: links; an iteration of 400 digits
index: a key nested deeply; a key that doubles; a tensor of 4 TB; a tensor of 2^66 bytes; a size beyond 64 bits; a
    tensor of which a part is stored; a tensor of which nothing is stored
index, strange: a link to nowhere; a link to itself; a link to its copy
its settings: nested deeply; half a character
manifest: a size without end
manifest, strange: a pipe; a link to an endless device; a hole of 8 GB; a pipe that is listed; directories without
    end
megatron: a key nested deeply; a key that doubles; arguments that double; arguments that hold themselves; arguments
    nested deeply; arguments that are the rest; arguments as a huge tensor; a model that holds itself; a model that
    doubles; as many ranks; as many layers; an iteration of 400 digits; a
    version of 400 digits
megatron, before torch 1.6: a key nested deeply; a key that doubles
megatron, strange: a pipe
own tokenizer: nested deeply; mappings nested deeply
own tokenizer, strange: a link to nowhere; a link to itself; a link to its copy
pretrain: links; an iteration of 400 digits
pretrain with flags: links; an iteration of 400 digits
sample index: brackets nested deeply; signs nested deeply; an open bracket; an odd indent; a key that is a mapping;
    no shape; a true shape; no type; a header of 4 GB; half a zip; a single number
shuffle index: half a zip
tensors: a key nested deeply; a key that doubles; lists nested deeply; a string of a terabyte, so it says; a memo of
    2^31; pops an empty stack; refers to what is not there; many empty dictionaries; compressed zeros; entries that
    overlap; two pickles; no pickle; a hostile archive behind; a hostile archive before; a TorchScript module; cut
    in half; a tensor over one number
tensors, strange: a link to nowhere; a link to itself; a link to its copy
tokenizer.json: a table of nothing; a table that points outside; a prefix longer than a word; a template without its
    token; no word for the unknown
tracker, strange: a pipe; a link to an endless device; a hole of 8 GB
verify: links; an iteration of 400 digits; a count in words; no count; a count of 400 digits; a title for the
    window; half a character
vocab.json: nested deeply; mappings nested deeply; an id of 2^40; an id of 400 digits; half a character
"""
PENDING = {
    place: tuple(names.split("; "))
    for place, _, names in (line.partition(": ") for line in KNOWN.replace("\n    ", " ").strip().splitlines())
}

# --- the child that reads ---------------------------------------------------------------------------------------

# Audit events (beginnings of their names) of what no reader has to do.
FORBIDDEN = (
    "os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "ctypes.dlopen", "socket.",
    "pickle.find_class", "code.__new__", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.chmod", "os.chown", "os.truncate", "os.utime", "os.putenv", "shutil.",
)  # fmt: skip


@dataclass
class Outcome:
    """What came of reading. `error` names an exception ("" for none) or the signal that ended the process."""

    error: str = ""
    ours: bool = False
    message: str = ""
    done: list[str] = field(default_factory=list)
    megabytes: int = 0


def suspicious(event: str, arguments: tuple) -> bool:
    """Whether an audit event is one that reading has no part in."""
    if event == "open":
        changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        return isinstance(arguments[2], int) and bool(arguments[2] & changes) and arguments[0] != os.devnull
    if event == "exec":  # the code of a file is a module's, which is imported late
        name = arguments[0].co_filename
        return not (name.startswith("<frozen") or os.path.exists(name))
    return event.startswith(FORBIDDEN) or (event == "import" and arguments[0] == "this")


def status(name: str) -> int:
    """A figure of this process in kB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def watched(actions: Mapping[str, Callable[[], object]]) -> dict[str, Outcome]:
    """Do the actions in a child process, one after the other; after one that kills it, the others in a new one."""
    outcomes: dict[str, Outcome] = {}
    while left := {name: action for name, action in actions.items() if name not in outcomes}:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                report(left, writer)
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            found = [Outcome(**json.loads(line)) for line in pipe.read().splitlines()]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = Outcome(error=signal.Signals(-code).name if code < 0 else f"exit code {code}")
        outcomes |= zip(left, [*found, killed], strict=False)
    return outcomes


def report(actions: Mapping[str, Callable[[], object]], writer: int) -> None:
    """The child's part: a line of JSON an action."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    most = (status("VmSize") << 10) + (4 << 30)  # what grows without end must not take the machine along
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    done: list[str] = []
    sys.addaudithook(lambda *event: done.append(f"{event!a:.200}") if suspicious(*event) else None)
    for action in actions.values():
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before, outcome = status("VmHWM"), Outcome(done=done)
        done.clear()
        signal.alarm(SECONDS)
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - what is no error of ours is the finding
            outcome.error, outcome.ours = type(error).__name__, isinstance(error, EELLMError)
            outcome.message = str(error)
        signal.alarm(0)
        outcome.megabytes = (status("VmHWM") - before) >> 10
        os.write(writer, json.dumps(vars(outcome)).encode() + b"\n")


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """With a plain pickle reader each of them does what it is here for, and it is seen."""
    actions = {name: functools.partial(pickle.loads, pickled(name, tmp_path / "mark")) for name in PAYLOADS | BODIES}
    outcomes = watched(actions)
    assert len(outcomes) >= 20
    assert [name for name, outcome in outcomes.items() if not outcome.done] == ["behind the end"]


def test_the_child_tells_how_it_ended() -> None:
    outcomes = watched({
        "fine": lambda: None,
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "failed": lambda: 1 / 0,
        "large": lambda: (b"x" * (50 << 20)).count(b"y"),
    })  # fmt: skip
    assert [outcome.error for outcome in outcomes.values()] == ["", "SIGKILL", "ZeroDivisionError", ""]
    assert 45 < outcomes["large"].megabytes < 60 and outcomes["fine"].megabytes < 5


# --- the places that read files ---------------------------------------------------------------------------------

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


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every place finds a good file; each is read here once, so that nothing is imported later."""
    root = tmp_path_factory.mktemp("good")
    tokenizer = train_byte_level_bpe(["the cat sat on the mat"] * 4, 300, merge_whitespace=False)
    (root / DIRECTORY).mkdir(parents=True)
    for name, text in tokenizer_files(tokenizer, "<|endoftext|>").items():
        (root / WORDS / name).write_text(text)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(root / WORDS / name, root / DIRECTORY)
    (root / DIRECTORY / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20), model_prefix=str(root / WORDS / "words"),
        vocab_size=30, hard_vocab_limit=False, minloglevel=9, num_threads=1,
    )  # fmt: skip
    words = [root / WORDS / name for name in ("vocab.json", "merges.txt")]
    native.save(root / "native", 5, RunState({"model/a": torch.ones(3, 2)}, {"consumed_samples": 12}), words)
    for rank in range(2):
        weight = {"word_embeddings": {"weight": torch.ones(4, 2)}}
        state = {"args": Namespace(seed=1), "model": {"language_model": {"embedding": weight}}, "iteration": 7}
        (root / LEGACY / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save(state, root / LEGACY / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    (root / "config").mkdir()
    flags = load(training_flags(Path("corpus"), Path("cache"))).config
    for name in ("config.yaml", "config.json"):
        save_config(root / "config" / name, flags)
    (root / DATA).mkdir()
    write_corpus(root / DATA / "corpus")
    (root / DATA / "sums.json").write_text(json.dumps([int(sum(read_corpus(root)[i])) for i in range(3)]))
    (root / "texts").mkdir()
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    parquet.write_table(table({"text": ["the cat"]}), root / "texts" / "corpus.parquet")
    (root / "texts" / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the cat"}\n'))
    for place in PLACES.values():
        place.read(root)
    return root


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


@pytest.mark.parametrize("name", PLACES)
def test_no_payload_runs_anywhere(good: Path, tmp_path: Path, name: str) -> None:
    place, actions = PLACES[name], {}
    for payload in PAYLOADS | BODIES:
        (tmp_path / payload).mkdir()
        content = place.wrap(pickled(payload, tmp_path / payload / "mark"))
        root = spoilt(good, tmp_path / payload, place, lambda path, content=content: path.write_bytes(content))
        actions[payload] = functools.partial(place.read, root)
    for payload, outcome in watched(actions).items():
        check = assert_nothing_done if name in PENDING.get("payloads", ()) else assert_refused
        check(outcome, place, tmp_path / payload, payload)
        assert not (tmp_path / payload / "mark").exists()


# --- bombs and traps: what takes all memory, never ends, or meets code that expects something else ---------------


def arguments(value: bytes) -> bytes:
    """A checkpoint of Megatron whose arguments hold a value, given as opcodes."""
    spaces = b"cargparse\nNamespace\n)\x81}" + word("x") + value + b"sb"
    return archive(P2 + b"}(" + word("args") + spaces + word("model") + b"}u.")


def doubled_dictionaries(levels: int = 60) -> bytes:
    steps = b"".join(b"K\x01}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(levels))
    return b"}(K\x00}q\x00" + steps + b"u"


def legacy(**changes: object) -> Trap:
    return lambda good: saved(torch.load(io.BytesIO(good), weights_only=False) | changes)


def spread(*shape: int) -> torch.Tensor:
    """A tensor of any size over a single number."""
    return torch.zeros(1).expand(*shape)


LEGACY_TRAPS = {
    "arguments that double": lambda good: arguments(doubled()),
    "arguments that hold themselves": lambda good: arguments(b"]q\x00h\x00a"),
    "arguments nested deeply": lambda good: arguments(b"]" * 50_000 + b"a" * 49_999),
    "arguments that are the rest": lambda good: archive(P2 + b"}q\x00(" + word("args") + b"h\x00u."),
    "arguments as a huge tensor": legacy(args=Namespace(x=spread(1 << 40))),
    "a model that holds itself": lambda good: archive(
        P2 + b"}(" + word("args") + b"}" + word("model") + b"}q\x00" + word("a") + b"h\x00su."
    ),
    "a model that doubles": lambda good: archive(
        P2 + b"}(" + word("args") + b"}" + word("model") + doubled_dictionaries() + b"u."
    ),
    "an iteration of 400 digits": legacy(iteration=10**400),
    "a version of 400 digits": legacy(checkpoint_version=10**400),
    "as many ranks": legacy(args=Namespace(tensor_model_parallel_size=10**400)),
    "as many layers": legacy(args=Namespace(num_layers=10**400)),
}


def tampered(change: Callable) -> Trap:
    """An index in which something was changed."""

    def trap(good: bytes) -> bytes:
        metadata = pickle.loads(good)
        change(metadata)
        return pickle.dumps(metadata)

    return trap


def resized(*shape: int) -> Trap:
    def change(metadata: object) -> None:
        entry = metadata.state_dict_metadata["model/a"]
        entry.size = entry.chunks[0].sizes = shape

    return tampered(change)


def placed(**where: object) -> Trap:
    return tampered(lambda metadata: [vars(place).update(where) for place in metadata.storage_data.values()])


INDEX_TRAPS = {
    "a tensor of 4 TB": resized(10**12),
    "a tensor of 2^66 bytes": resized(2**62, 4),
    "a size beyond 64 bits": resized(2**70),
    "a tensor of which a part is stored": tampered(
        lambda metadata: setattr(metadata.state_dict_metadata["model/a"].chunks[0], "sizes", torch.Size((1, 2)))
    ),
    "a tensor of which nothing is stored": tampered(
        lambda metadata: setattr(metadata.state_dict_metadata["model/a"], "chunks", [])
    ),
    "a file of 2^63 bytes": placed(length=2**63),
    "a place at 2^63 - 1": placed(offset=2**63 - 1),
    "another file": placed(relative_path="../facts.json"),
    "a file from the root on": placed(relative_path="/etc/passwd"),
}


def facts(**changes: object) -> Trap:
    return lambda good: json.dumps(json.loads(good) | changes).encode()


def own_file(name: str) -> Trap:
    """Facts that name a file as one of the tokenizer's."""
    return lambda good: facts(tokenizer_sha256={name: sha256(b"").hexdigest()})(good)


JSON_BOMBS = {
    "nested deeply": lambda good: b"[" * DEEP,
    "mappings nested deeply": lambda good: b'{"a":' * DEEP,
    "a number of 5000 digits": lambda good: b'{"format": %b}' % (b"9" * 5000),
    "a list": lambda good: b"[1]",
    "null": lambda good: b"null",
    "no text": lambda good: b"\xff\xfe\x00",
    "nothing": lambda good: b"",
}
FACTS_TRAPS = {
    "an iteration of 400 digits": facts(iteration=10**400),
    **{f"tokenizer file {name[:20]!a}": own_file(name) for name in (
        "../facts.json", "/etc/passwd", "..", ".", "", "a" * 5000, "a\0b", "\ud800", "a/b", "vocab.json/",
    )},
}  # fmt: skip


def sized(text: bytes) -> Trap:
    """A manifest whose first size is `text`."""
    return lambda good: good.replace(b'"size": ', b'"size": %b, "was": ' % text, 1)


def renamed(name: str) -> Trap:
    """A manifest, whole in itself, that lists another file."""

    def trap(good: bytes) -> bytes:
        entries = json.loads(good)["files"]
        return manifest._encode({name: entries.pop("facts.json"), **entries})

    return trap


MANIFEST_TRAPS = {
    "a size without end": sized(b"1e999"),
    "a size that is none": sized(b"NaN"),
    "a size of 4000 digits": sized(b"9" * 4000),
    "a negative size": sized(b"-1"),
    **{
        f"lists {name!a}": renamed(name)
        for name in ("../facts.json", "/etc/passwd", "", ".", "tensors", "a\0", "\ud800")
    },
}


def yaml(text: str) -> Trap:
    return lambda good: text.encode()


def laughs(last: str) -> str:
    """A YAML list in which each item holds the one before twice."""
    items = ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 50))
    return f"x: [&a0 [1, 1], {items}]\n{last}: *a49\n"


YAML_TRAPS = {
    "python/object/apply": yaml('num_layers: !!python/object/apply:os.system ["touch mark"]'),
    "python/object/new": yaml('!!python/object/new:os.system ["touch mark"]'),
    "python/name": yaml("num_layers: !!python/name:os.system"),
    "python/module": yaml("num_layers: !!python/module:os"),
    "python/tuple": yaml("num_layers: !!python/tuple [1]"),
    "lists that double": yaml(laughs("num_layers")),
    "lists that double, unknown": yaml(laughs("unknown")),
    "lists that double, of a blend": yaml(laughs("data_path")),
    "mappings merged twice each": yaml(
        "x:\n- &a0 {a: 1}\n" + "".join(f"- &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 50))
    ),
    "a list in itself": yaml("num_layers: &a [*a]"),
    "nested deeply": yaml("[" * DEEP),
    "no truth": yaml("num_layers: !!bool maybe"),
    "no number": yaml('num_layers: !!int ""'),
    "no fraction": yaml('lr: !!float ""'),
    "no date": yaml("num_layers: !!timestamp today"),
    "a key that is a list": yaml("? [1]\n: 2"),
    "a number of 10^5 digits": yaml("num_layers: 0x" + "f" * 100_000),
}


def array(header: str, version: int = 1) -> Trap:
    """An .npy file of a header of one's own."""
    size = "<H" if version == 1 else "<I"
    return lambda good: (
        b"\x93NUMPY%c\0" % version + struct.pack(size, len(header) + 1) + header.encode() + b"\n" + good[128:]
    )


def shaped(shape: str, descr: str = "'<i4'") -> Trap:
    return array(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


def stored(content: object) -> Trap:
    return lambda good: npy(np.asarray(content))


NPY_TRAPS = {
    "objects": lambda good: npy(np.array([{}, None], dtype=object)),
    "objects in fields": shaped("(1,)", "[('a', 'O')]"),
    "an expression": array("__import__('os').system('touch mark')"),
    "brackets nested deeply": array("(" * 5000),
    "signs nested deeply": array("-" * 9000 + "1"),
    "an open bracket": array("{'descr': '<i4', 'shape': (3,"),
    "an odd indent": array("  1\n 2"),
    "a key that is a mapping": array("{{}: 1}"),
    "a shape of 2^64": shaped("(4611686018427387904, 4)"),
    "a shape beyond": shaped("(1" + "0" * 30 + ",)"),
    "a negative shape": shaped("(-4,)"),
    "no shape": shaped("()"),
    "a true shape": shaped("(True,)"),
    "no type": shaped("(1,)", "('<i4',)"),
    "a header of 4 GB": lambda good: b"\x93NUMPY\x02\0\xff\xff\xff\xff",
    "a zip": lambda good: archive(b"N."),
    "half a zip": lambda good: b"PK\x03\x04",
    "a single number": stored(np.int32(3)),
    "a cube": stored(np.zeros((1, 1, 1), np.int32)),
    "fractions": stored(np.full((60, 2), np.nan)),
    "nothing": lambda good: b"",
}


def index_file(lengths: list[int], pointers: list[int], documents: list[int], **header: int) -> Trap:
    head = {"code": 8, "sequences": len(lengths), "borders": len(documents)} | header
    packed = HEADER.pack(MAGIC, 1, head["code"], head["sequences"], head["borders"])
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8"))
    return lambda good: packed + b"".join(each.tobytes() for each in arrays)


IDX_TRAPS = {
    "2^64 sequences": index_file([5], [0], [0, 1], sequences=2**64 - 1),
    "2^64 borders": index_file([5], [0], [0, 1], borders=2**64 - 1),
    "a negative length": index_file([5, -5], [0, 10], [0, 1, 2]),
    "a length beyond the file": index_file([5, 2**31 - 1], [0, 10], [0, 1, 2]),
    "a pointer before the file": index_file([5, 5], [0, -10], [0, 1, 2]),
    "a pointer beyond the file": index_file([5, 5], [0, 2**62], [0, 1, 2]),
    "borders that run back": index_file([5, 5], [0, 10], [0, 2, 1, 2]),
    "no numbers": index_file([5], [0], [0, 1], code=7),
    "an unknown type": index_file([5], [0], [0, 1], code=200),
}


def changed(**changes: object) -> Trap:
    return lambda good: json.dumps(json.loads(good) | changes).encode()


def normalizer(kind: str, **values: object) -> Trap:
    return changed(normalizer={"type": kind, **values})


VOCAB_TRAPS = {
    "an id of 2^40": changed(zz=2**40),
    "an id of 400 digits": changed(zz=10**400),
    "half a character": changed(**{"\ud800": 7}),
    "a negative id": changed(zz=-1),
    "a true id": changed(zz=True),
}
TOKENIZER_TRAPS = {
    "a table of nothing": normalizer("Precompiled", precompiled_charsmap="AAAA"),
    "a table that points outside": normalizer("Precompiled", precompiled_charsmap="BAAAAP////9/"),
    "a prefix longer than a word": lambda good: changed(
        model={**json.loads(good)["model"], "continuing_subword_prefix": "x" * 100}
    )(good),
    "a template without its token": changed(
        post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                        "pair": [], "special_tokens": {}},
    ),
    "no word for the unknown": changed(model={"type": "WordLevel", "unk_token": "?", "vocab": {}}),
    "normalizers nested deeply": lambda good: good.rstrip()[:-1] + b', "normalizer": ' + (
        b'{"type": "Sequence", "normalizers": [' * DEEP
    ),
}  # fmt: skip
EVIL = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
SETTINGS_TRAPS = {
    "code beside it": changed(tokenizer_class="Evil", auto_map=EVIL),
    "code elsewhere": changed(tokenizer_class="Evil", auto_map={"AutoTokenizer": "somebody/evil--evil.Evil"}),
    "a class that is a number": changed(tokenizer_class=5),
    "a class that is itself": changed(tokenizer_class="AutoTokenizer"),
}


def bombs(wrap: Callable[[bytes], bytes]) -> dict[str, Trap]:
    return {name: lambda good, body=body: wrap(body) for name, body in PICKLE_BOMBS.items()}


def some_json(*names: str) -> dict[str, Trap]:
    return {name: JSON_BOMBS[name] for name in names}


TRAPS: dict[str, Mapping[str, Trap]] = {
    "megatron": bombs(archive) | LEGACY_TRAPS | ARCHIVES,
    "megatron, before torch 1.6": bombs(before_1_6),
    "index": bombs(bytes) | INDEX_TRAPS,
    "tensors": bombs(archive) | ARCHIVES | {"a tensor over one number": lambda good: saved(spread(1 << 40))},
    "facts": JSON_BOMBS | FACTS_TRAPS,
    "manifest": JSON_BOMBS | MANIFEST_TRAPS,
    "tracker": {
        "digits without end": lambda good: b"1" * (5 << 20),
        "no number": lambda good: b"-1",
        "Arabic digits": lambda good: "٣".encode(),
    },
    "own tokenizer": JSON_BOMBS,
    "config.yaml": YAML_TRAPS,
    "config.json": {name: bomb for name, bomb in JSON_BOMBS.items() if name != "null"},  # that is an empty one
    "vocab.json": JSON_BOMBS | VOCAB_TRAPS,
    "tokenizer.json": JSON_BOMBS | TOKENIZER_TRAPS,
    "its settings": some_json("nested deeply", "no text", "nothing")
    | {"half a character": changed(eos_token="\ud800"), "an odd token": changed(eos_token=[1])},
    "directory": JSON_BOMBS,
    "directory, settings": some_json("nested deeply", "null", "a list", "no text", "nothing") | SETTINGS_TRAPS,
    "sentencepiece": {
        "nothing": lambda good: b"",
        "half of it": lambda good: good[: len(good) // 2],
        "lengths without end": lambda good: b"\x0a\xff\xff\xff\xff\x07" * 1000,
    },
    ".idx": IDX_TRAPS,
    "sample index": NPY_TRAPS,
    "document index": {name: NPY_TRAPS[name] for name in ("objects", "an expression", "no shape", "half a zip")},
    "shuffle index": {name: NPY_TRAPS[name] for name in ("objects", "an expression", "no shape", "half a zip")},
    "index description": {"no text": lambda good: b"\xff\xfe", "another": lambda good: good + b" "},
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_and_bombs_are_refused_soon(good: Path, tmp_path: Path, name: str) -> None:
    place, actions = PLACES[name], {}
    for trap, make in TRAPS[name].items():
        if trap not in PENDING.get(name, ()):
            here = tmp_path / str(len(actions))
            root = spoilt(good, here, place, lambda path, make=make: path.write_bytes(make(path.read_bytes())))
            actions[trap] = functools.partial(place.read, root)
    for number, (trap, outcome) in enumerate(watched(actions).items()):
        assert_refused(outcome, place, tmp_path / str(number), trap)


# --- what is no ordinary file -----------------------------------------------------------------------------------


def hole(path: Path, content: bytes) -> None:
    """8 GB that take no disk."""
    with open(path, "wb") as file:
        file.truncate(8 << 30)


def link_to_copy(path: Path, content: bytes) -> None:
    """The same content, size and hash, but outside."""
    outside = path.parents[4] / "outside"
    outside.write_bytes(content)
    path.unlink(missing_ok=True)
    path.symlink_to(outside)


STRANGE: dict[str, Callable[[Path, bytes], object]] = {
    "a pipe": lambda path, content: os.mkfifo(path),
    "a link to an endless device": lambda path, content: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path, content: path.symlink_to("nowhere"),
    "a link to itself": lambda path, content: path.symlink_to(path.name),
    "a directory": lambda path, content: path.mkdir(),
    "a hole of 8 GB": hole,
    "a link to its copy": link_to_copy,
}
WHOLE = {
    name: replace(PLACES[name], read=read_whole, named=NATIVE, after=lambda root: None)
    for name in ("manifest", "facts", "index", "tensors", "own tokenizer")
}
KEPT_BY_NAME = {"tracker": PLACES["tracker"], "megatron": PLACES["megatron"]}


@pytest.mark.parametrize("name", WHOLE | KEPT_BY_NAME)
def test_no_pipe_device_or_link_is_read(good: Path, tmp_path: Path, name: str) -> None:
    place, actions = (WHOLE | KEPT_BY_NAME)[name], {}
    for kind, make in STRANGE.items():
        if kind == "a link to its copy" and name in ("manifest", *KEPT_BY_NAME):
            continue  # no manifest vouches for those, and people do link large files

        def replaced(path: Path, make: Callable = make) -> None:
            content = path.read_bytes()
            path.unlink()
            make(path, content)

        if kind not in PENDING.get(f"{name}, strange", ()):
            actions[kind] = functools.partial(place.read, spoilt(good, tmp_path / kind / "a" / "b", place, replaced))
    for kind, outcome in watched(actions).items():
        assert_refused(outcome, place, tmp_path / kind / "a" / "b", kind)


def test_a_pipe_that_the_manifest_lists_is_not_waited_for(good: Path, tmp_path: Path) -> None:
    if "a pipe that is listed" in PENDING.get("manifest, strange", ()):
        pytest.skip("known")
    directory = shutil.copytree(good / "native", tmp_path / "native") / "iter_0000005"
    os.mkfifo(directory / "pipe")
    entries = json.loads((directory / "manifest.json").read_text())["files"]
    entries["pipe"] = {"sha256": sha256(b"").hexdigest(), "size": 0}
    (directory / "manifest.json").write_bytes(manifest._encode(entries))
    (outcome,) = watched({"pipe": functools.partial(read_whole, tmp_path)}).values()
    assert_refused(outcome, WHOLE["manifest"], tmp_path, "pipe")


def test_directories_without_end(good: Path, tmp_path: Path) -> None:
    if "directories without end" in PENDING.get("manifest, strange", ()):
        pytest.skip("known")
    inside = shutil.copytree(good / "native", tmp_path / "native") / "iter_0000005"
    made = []
    for _ in range(1200):
        inside = inside / "d"
        inside.mkdir()
        made.append(inside)
    (outcome,) = watched({"deep": functools.partial(read_whole, tmp_path)}).values()
    for path in reversed(made):  # nobody else can
        path.rmdir()
    assert_refused(outcome, WHOLE["manifest"], tmp_path, "deep")


# --- commands, from the command line to the exit code -----------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a short run: `corpus`, `save`."""
    root = tmp_path_factory.mktemp("run")
    flags = training_flags(write_corpus(root / "corpus"), root / "cache", save=root / "save", train_iters=4)
    assert pretrain.main(flags) == 0
    return root


def ends(command: Callable[[list[str]], int], argv: list[str], code: int) -> str:
    """Run a command to its exit code: with one message, and nothing in it that a terminal would obey."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert command(argv) == code, said.getvalue()
    assert code == 0 or said.getvalue().splitlines()[-1], said.getvalue()
    assert all(line.isprintable() for line in said.getvalue().splitlines()), ascii(said.getvalue())
    return said.getvalue()


def hostile_index(checkpoint: Path) -> None:
    (checkpoint / "tensors" / ".metadata").write_bytes(BODIES["INST"] % b"touch mark")
    seal(checkpoint)


def hostile_tensors(checkpoint: Path) -> None:
    for path in (checkpoint / "tensors").glob("*.distcp"):
        path.write_bytes(archive(BODIES["INST"] % b"touch mark") * 100)
    seal(checkpoint)


def hostile_facts(**changes: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "facts.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        seal(checkpoint)

    return change


def linked_tensors(checkpoint: Path) -> None:
    (path,) = (checkpoint / "tensors").glob("*.distcp")
    link_to_copy(path, path.read_bytes())


DAMAGE = {
    "index": hostile_index,
    "tensors": hostile_tensors,
    "links": linked_tensors,
    "an iteration of 400 digits": hostile_facts(iteration=10**400),
    "a path for a tokenizer": hostile_facts(tokenizer_sha256={"/etc/passwd": "0"}),
}
COMMANDS = {
    "generate": lambda root: ends(
        generate.main, ["--load", f"{root}/save", "--device", "cpu", "--prompt", "1 2", "--tokens-to-generate", "2"], 4
    ),
    "pretrain": lambda root: ends(pretrain.main, ["--load", f"{root}/save", "--train-iters", "5"], 4),
    "pretrain with flags": lambda root: ends(
        pretrain.main, training_flags(root / "corpus", root / "cache", load=root / "save"), 4
    ),
    "verify": lambda root: ends(verify_checkpoint.main, [f"{root}/save"], 4),
}
# What a command has no need to look at.
UNSEEN = {
    ("verify", "tensors"),
    ("verify", "a path for a tokenizer"),
    ("pretrain with flags", "a path for a tokenizer"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_hostile_checkpoints(run: Path, tmp_path: Path, command: str) -> None:
    actions = {}
    for damage, make in DAMAGE.items():
        if (command, damage) not in UNSEEN and damage not in PENDING.get(command, ()):
            root = Path(shutil.copytree(run, tmp_path / str(len(actions)) / "a"))
            make(root / "save" / "iter_0000004")
            actions[damage] = functools.partial(COMMANDS[command], root)
    for damage, outcome in watched(actions).items():
        assert not outcome.error and not outcome.done, (damage, outcome)
    assert not Path("mark").exists()


LEGACY_COMMANDS = {
    "generate": lambda load: ends(
        generate.main, ["--load", load, "--tokenizer-type", "NullTokenizer", "--vocab-size", "3", "--prompt", "1"], 4
    ),
    "pretrain": lambda load: ends(pretrain.main, training_flags(Path("none"), Path("none"), load=load), 4),
    "pretrain as it was": lambda load: ends(
        pretrain.main, training_flags(Path("none"), Path("none"), load=load, use_checkpoint_args=True), 4
    ),
}


@pytest.mark.parametrize("command", LEGACY_COMMANDS)
def test_commands_refuse_hostile_files_of_megatron(tmp_path: Path, command: str) -> None:
    actions = {}
    for payload in PAYLOADS | BODIES:
        root = tmp_path / str(len(actions))
        path = root / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(archive(pickled(payload, tmp_path / "mark")))
        actions[payload] = functools.partial(LEGACY_COMMANDS[command], str(root))
    for payload, outcome in watched(actions).items():
        assert not outcome.error and not outcome.done, (payload, outcome)
    assert not (tmp_path / "mark").exists()


def test_a_hostile_config_file_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    actions = {}
    for number, (name, make) in enumerate(YAML_TRAPS.items()):
        if name not in PENDING.get("config.yaml", ()):
            path = tmp_path / f"{number}.yaml"
            path.write_bytes(make(b""))
            actions[name] = functools.partial(ends, pretrain.main, ["--config", str(path)], 2)
    for name, outcome in watched(actions).items():
        assert not outcome.error and not outcome.done, (name, outcome)


SHOWN = {
    "a count in words": (4, {"consumed_samples": "many"}),
    "no count": (4, {"consumed_samples": None}),
    "a count of 400 digits": (4, {"consumed_samples": 10**400}),
    "a title for the window": (0, {"torch": "\x1b]0;a title\x07\x1b[2J"}),
    "colours in a list": (0, {"torch": ["\x9b31m"]}),
    "half a character": (0, {"torch": "\ud800"}),
}


def test_the_verifier_shows_what_it_finds_and_obeys_nothing(good: Path, tmp_path: Path) -> None:
    actions = {}
    for name, (code, changes) in SHOWN.items():
        if name not in PENDING.get("verify", ()):
            root = Path(shutil.copytree(good / "native", tmp_path / name))
            hostile_facts(**changes)(root / "iter_0000005")
            actions[name] = functools.partial(ends, verify_checkpoint.main, [str(root), "--tensors"], code)
    for name, outcome in watched(actions).items():
        assert not outcome.error and not outcome.done, (name, outcome)
