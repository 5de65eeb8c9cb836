"""The commands that the documents give are run: every program's --help, and the README's tour on a small corpus."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.files import PACKAGE, ROOT, shown, tracked

BENCHMARKS = sorted(path for path in tracked() if path.match("benchmarks/*.py") and path.name != "report.py")
PROGRAMS = BENCHMARKS + sorted(
    path for path in tracked() if path.suffix == ".py" and (path.is_relative_to(ROOT / "tools") or path.parent == ROOT)
)
SCRIPTS = sorted(path for path in tracked() if path.suffix == ".sh" or path.parent.name == ".ci")


def run(*words: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("program", [path for path in PROGRAMS if path.name != "setup.py"], ids=shown)
def test_help(program: Path, tmp_path: Path) -> None:
    """From any directory, and without an installed package."""
    assert "--" in run(sys.executable, program, "--help", cwd=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=shown)
def test_benchmarks_end_with_a_line_of_json(benchmark: Path, tmp_path: Path) -> None:
    output = run(sys.executable, benchmark, "--quick", "--output", tmp_path / "kept.json").stdout
    figures = json.loads(output.splitlines()[-1])["figures"]
    assert figures and all({"name", "value", "goal", "met"} <= figure.keys() for figure in figures)
    assert json.loads((tmp_path / "kept.json").read_text())["hardware"]["cores"]


@pytest.mark.parametrize("script", SCRIPTS, ids=shown)
def test_scripts_are_shell(script: Path) -> None:
    run("bash", "-n", script)


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "examples/setup_env.sh", "tests/run.sh"])
def test_scripts_explain_themselves(script: str) -> None:
    assert f"bash {script}" in run("bash", ROOT / script, "--help").stdout


def tour() -> str:
    """The README's tour with so few iterations that it takes seconds."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tour:.*?-->\n```bash\n(.*?)^```", text, re.S | re.M)[1]
    short = {
        r"--vocab-size \d+": "--vocab-size 400",
        r"--train-iters \d+": "--train-iters 4",
        r"--lr-warmup-iters \d+": "--lr-warmup-iters 1",
        r"--(eval|save)-interval \d+": r"--\1-interval 2",
        r"--eval-iters \d+": "--eval-iters 1",
        r"--log-interval \d+": "--log-interval 1",
        r"--tokens-to-generate \d+": "--tokens-to-generate 8",
    }
    for pattern, replacement in short.items():
        block, count = re.subn(pattern, replacement, block)
        assert count, f"the tour no longer says {pattern}"
    return block


def test_tour(tmp_path: Path) -> None:
    """Every command of the tour runs as it stands, on text files, and leaves what the README says."""
    text = tmp_path / "my-text"
    text.mkdir()
    for source in sorted(PACKAGE.glob("data/*.py")):
        (text / f"{source.stem}.txt").write_bytes(source.read_bytes())
    for name in ("tools", "pretrain_early_exit_gpt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = run("bash", "-euo", "pipefail", "-c", tour(), cwd=tmp_path, PATH=path, MPLBACKEND="agg")
    made = tmp_path / "my-run"
    assert (made / "checkpoints" / "iter_0000004" / "facts.json").is_file()
    assert (made / "loss.png").stat().st_size > 1000
    assert len((made / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) >= 4
    for said in ("lm loss", "early loss [2]", "early loss [4]", "Once upon a time", "full model"):
        assert said in result.stdout


def test_planning_commands(tmp_path: Path) -> None:
    """A plan with its picture, and the dry run of a launch script, as the README gives them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- plan:.*?-->\n```bash\n(.*?)^```", text, re.S | re.M)[1]
    for name in ("tools", "examples", "pretrain_early_exit_gpt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = run("bash", "-euo", "pipefail", "-c", block, cwd=tmp_path, PATH=path)
    assert (tmp_path / "plan.svg").read_text(encoding="utf-8").startswith("<svg")
    for said in ("32.72B parameters on 64 x A100-80GB", "Its flags:", "it fits"):
        assert said in result.stdout
