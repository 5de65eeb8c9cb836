"""Every file operation of a save has a fault point before it: what is enumerated in the crash tests is all there is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron import faults
from megatron.checkpoint import native
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.checkpoint.state import RunState
from megatron.config.run import RunConfig
from megatron.config.stored import save_config
from tests.house.files import PACKAGE, dotted, parsed, shown
from tests.unit.checkpoint.convert.conftest import toy, write_megatron
from tests.unit.checkpoint.convert.sources import source

WRITERS = [PACKAGE / "files.py", *sorted((PACKAGE / "checkpoint").rglob("*.py"))]
CHANGING = {
    "mkdir", "rename", "unlink", "rmdir", "write_text", "write_bytes", "touch", "symlink_to", "fsync", "rmtree",
    "copyfile", "copytree", "copy", "copy2", "move", "makedirs", "truncate", "create_stream", "symlink", "link",
}  # fmt: skip
# Undoing a failure: not reached where all goes well, and best effort.
UNDOING = {"shutil.rmtree(staging, ignore_errors=True)", "os.unlink(temporary)"}
# Passed only where something has gone wrong before; the crash tests go there.
AFTER_A_FAULT = {"commit.undo", "commit.put_back", "commit.sweep", "commit.sweep_file"}


def changes_files(call: ast.Call) -> bool:
    name = dotted(call.func).rpartition(".")[2] or (call.func.attr if isinstance(call.func, ast.Attribute) else "")
    if name == "replace":
        return dotted(call.func) == "os.replace"
    if name == "copy":
        return dotted(call.func) == "shutil.copy"
    if name == "open":
        modes = [a.value for a in (*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode"))
                 if isinstance(a, ast.Constant)]  # fmt: skip
        return any(set(str(mode)) & set("wax+") for mode in modes)
    return name in CHANGING


def unguarded(path: Path, source: ast.Module) -> Iterator[str]:
    """File operations with no `faults.point` of their own on the lines before, in the same function."""
    for function in (node for node in ast.walk(source) if isinstance(node, ast.FunctionDef)):
        calls = sorted(
            (n for n in ast.walk(function) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)
        )
        guarded = False
        for call in calls:
            if dotted(call.func) == "faults.point":
                guarded = True
            elif changes_files(call) and ast.unparse(call) not in UNDOING:
                if not guarded:
                    yield f"{path}:{call.lineno}: {ast.unparse(call)}"
                guarded = ast.unparse(call).endswith(".mkdir(exist_ok=True)")  # a directory and what goes into it


def test_every_file_operation_has_a_point() -> None:
    assert not [line for path in WRITERS for line in unguarded(Path(shown(path)), parsed(path))]


def test_the_rule_finds_what_it_should() -> None:
    lines = "faults.point('a')", "p.rename(q)", "q.write_text('')", "open(p, 'wb')", "open(p)", "os.replace(p, q)"
    source = "def f(p, q):\n " + "\n ".join(lines)
    assert [line.rpartition(": ")[2] for line in unguarded(Path("x"), ast.parse(source))] == [
        "q.write_text('')", "open(p, 'wb')", "os.replace(p, q)",
    ]  # fmt: skip


def test_a_save_passes_every_point(tmp_path: Path) -> None:
    words = tmp_path / "vocab.json"
    words.write_text("{}")
    state = RunState({"model/a": torch.zeros(3)})
    native.save(tmp_path / "run", 1, state)
    with faults.armed() as passed:
        native.save(tmp_path / "run", 1, state, [words])
        save_config(tmp_path / "run" / "config.yaml", RunConfig())
        native.save(tmp_path / "run", 2, state)
        native.prune(tmp_path / "run", 1, 2)
        write_megatron(toy(), tmp_path / "files")
        write_hf(source(), tmp_path / "huggingface")
    named = {
        call.args[-1].value
        for path in WRITERS
        for call in ast.walk(parsed(path))
        if isinstance(call, ast.Call) and dotted(call.func) in ("faults.point", "faults.watched")
    }
    assert named - AFTER_A_FAULT == set(passed)
