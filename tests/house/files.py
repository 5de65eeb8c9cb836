"""The files of the repository, as the house rules look at them."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron"


MADE = {"build", "dist", "runs", "quickstart-run", "__pycache__"}


@cache
def tracked() -> tuple[Path, ...]:
    """All files of the project: what git tracks or would; without git, what is neither hidden nor made by a run."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [shown(path) for path in ROOT.rglob("*") if not is_made(path.relative_to(ROOT).parts)]
    return tuple(ROOT / name for name in names if name and (ROOT / name).is_file())


def is_made(parts: tuple[str, ...]) -> bool:
    """Whether a path, in parts, is hidden, built or written by a run."""
    return any(part in MADE or part[0] == "." or part.endswith((".egg-info", ".so")) for part in parts)


def product_sources() -> list[Path]:
    """The Python files that users run: package, tools, examples, entry points; not the tests."""
    return [path for path in tracked() if path.suffix == ".py" and ROOT / "tests" not in path.parents]


def shown(path: Path) -> str:
    """A path as messages show it."""
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""
