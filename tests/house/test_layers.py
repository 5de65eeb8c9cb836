"""Who may import whom (.importlinter), and that a new room or a wrong import would be noticed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.house.files import PACKAGE, ROOT

LINT = Path(sys.executable).with_name("lint-imports")


def lint(directory: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [LINT, "--no-cache"], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_import_rules_hold() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_rules_bite(tmp_path: Path) -> None:
    """The same rules on a copy of the package with three wrongs in it."""
    (tmp_path / ".importlinter").write_bytes((ROOT / ".importlinter").read_bytes())
    for source in PACKAGE.rglob("*.py"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (tmp_path / "megatron" / "__init__.py").write_text("")
    (tmp_path / "megatron" / "nn" / "upward.py").write_text("import megatron.train.step\n")
    (tmp_path / "megatron" / "config" / "heavy.py").write_text("import torch\n")
    (tmp_path / "megatron" / "newroom").mkdir()
    (tmp_path / "megatron" / "newroom" / "__init__.py").write_text("")
    result = lint(tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    for wrong in ("megatron.newroom", "megatron.nn.upward -> megatron.train.step", "megatron.config.heavy -> torch"):
        assert wrong in result.stdout
