"""Commands meet hostile files, from the command line to the exit code (row R13)."""

import contextlib
import functools
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.cli import convert_checkpoint, generate, pretrain, verify_checkpoint
from megatron.testing.corpus import training_flags, write_corpus
from tests.unit.checkpoint.hostile.places import link_to_copy, seal
from tests.unit.checkpoint.hostile.traps import YAML_TRAPS
from tests.unit.checkpoint.hostile.watch import watched
from tests.unit.checkpoint.pickles import (
    BODIES,
    PAYLOADS,
    archive,
    pickled,
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches a forked process through Linux's /proc")


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
    "convert": lambda root: ends(
        convert_checkpoint.main, ["--load-dir", f"{root}/save", "--save-dir", f"{root}/out", "--to", "megatron"], 4
    ),
}
# What a command has no need to look at.
UNSEEN = {
    ("verify", "tensors"),
    ("verify", "a path for a tokenizer"),
    ("pretrain with flags", "a path for a tokenizer"),
    ("convert", "tensors"),  # met once the target is begun: test_a_conversion_ends_at_hostile_tensors
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_hostile_checkpoints(run: Path, tmp_path: Path, command: str) -> None:
    actions = {}
    for damage, make in DAMAGE.items():
        if (command, damage) not in UNSEEN:
            root = Path(shutil.copytree(run, tmp_path / str(len(actions)) / "a"))
            make(root / "save" / "iter_0000004")
            actions[damage] = functools.partial(COMMANDS[command], root)
    for damage, outcome in watched(actions).items():
        assert not outcome.error and not outcome.done, (damage, outcome)
    assert not Path("mark").exists()


def test_a_conversion_ends_at_hostile_tensors(run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run, tmp_path / "a"))
    hostile_tensors(root / "save" / "iter_0000004")
    COMMANDS["convert"](root)
    assert not list((root / "out").iterdir())
    assert not Path("mark").exists()


LEGACY_COMMANDS = {
    "generate": lambda load: ends(
        generate.main, ["--load", load, "--tokenizer-type", "NullTokenizer", "--vocab-size", "3", "--prompt", "1"], 4
    ),
    "pretrain": lambda load: ends(pretrain.main, training_flags(Path("none"), Path("none"), load=load), 4),
    "convert": lambda load: ends(
        convert_checkpoint.main, ["--load-dir", load, "--save-dir", f"{load}/out", "--to", "native"], 4
    ),
    "pretrain as it was": lambda load: ends(
        pretrain.main, training_flags(Path("none"), Path("none"), load=load, use_checkpoint_args=True), 4
    ),
}


@pytest.mark.usefixtures("run")  # a run imports late what it needs
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
        root = Path(shutil.copytree(good / "native", tmp_path / name))
        hostile_facts(**changes)(root / "iter_0000005")
        actions[name] = functools.partial(ends, verify_checkpoint.main, [str(root), "--tensors"], code)
    for name, outcome in watched(actions).items():
        assert not outcome.error and not outcome.done, (name, outcome)
