"""The form that all benchmarks share: what a figure says, what is kept, and when `--check` ends with 1."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from tests.house.files import ROOT


@pytest.fixture(scope="module")
def report() -> ModuleType:
    path = ROOT / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["report"]


def finish(report: ModuleType, *figures: object, **options: object) -> int:
    return report.finish("name", figures, Namespace(**{"quick": False, "check": False, "output": None} | options))


def test_a_figure_keeps_its_rounds_and_quartiles(report: ModuleType) -> None:
    figure = report.Figure.of("x", [3.0, 1.0, 2.0, 4.0, 5.0], "s", 2.5)
    assert (figure.value, figure.rounds, figure.quartiles) == (3.0, (3.0, 1.0, 2.0, 4.0, 5.0), (2.0, 4.0))
    assert report.Figure("x", 3.0).quartiles is report.Figure.of("x", [3.0]).quartiles is None


@pytest.mark.parametrize(
    ("samples", "at_least", "verdict"),
    [([1.2, 1.3, 1.4], True, "met"), ([0.9, 1.2, 1.4], True, "met, within the spread"), ([1.0], True, "MISSED"),
     ([0.8, 0.9, 1.0], False, "met"), ([1.0, 1.1, 1.3], False, "met, within the spread"), ([1.2], False, "MISSED")],
)  # fmt: skip
def test_the_verdict_knows_the_spread(report: ModuleType, samples: list[float], at_least: bool, verdict: str) -> None:
    figure = report.Figure.of("x", samples, "x", 1.1, at_least)
    assert figure.verdict == verdict and figure.met == (verdict != "MISSED")


def test_check_ends_with_1_where_a_goal_is_missed(report: ModuleType, capsys: pytest.CaptureFixture) -> None:
    good, bad = report.Figure("good", 2.0, "x", 1.0), report.Figure("bad", 0.5, "x", 1.0)
    unknown, plain = report.Figure("unknown", None, "x", 1.0), report.Figure("plain", 7.0)
    assert finish(report, good, plain, check=True) == 0
    assert finish(report, good, bad, check=True) == 1
    assert finish(report, good, bad) == 0
    capsys.readouterr()
    assert finish(report, good, plain, unknown, check=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "goals: 1 met, 0 missed, 1 not measured (unknown)"
    assert json.loads(lines[-1])["goals"] == {"met": 1, "missed": 0, "not measured": 1}


def test_what_is_kept(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "kept.json"
    finish(report, report.Figure.of("x", [1.0, 2.0, 3.0], "s", 2.5), output=path)
    kept = json.loads(path.read_text())
    (figure,) = kept["figures"]
    assert (figure["value"], figure["rounds"], figure["quartiles"]) == (2.0, [1.0, 2.0, 3.0], [1.5, 2.5])
    assert not figure["met"]
    assert {"python", "torch", "transformers", "datasets", "tokenizers"} <= kept["versions"].keys()
    assert kept["commit"] is None or len(kept["commit"].removesuffix("-dirty")) == 40
    assert "2 s (1.5 to 2.5)" in capsys.readouterr().out


def test_ratios_are_of_rounds(report: ModuleType) -> None:
    assert report.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
