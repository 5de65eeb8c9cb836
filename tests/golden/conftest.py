"""`pytest tests/golden --golden DIR`: cases are found by their `case.json`; others of the same kinds run unchanged."""

import json
from functools import cache
from pathlib import Path

import pytest

DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=None, help="directory of golden cases (default: ../shared/golden)")


def golden_root(config: pytest.Config) -> Path:
    given = config.getoption("--golden", default=None)
    return Path(given).resolve() if given else DEFAULT


@cache
def read_case(directory: Path) -> dict:
    return json.loads((directory / "case.json").read_text())


def find_cases(root: Path, kind: str) -> list[Path]:
    """Case directories whose `case.json` and neighbours make them of `kind`; empty where there is no `root`."""
    found = []
    for path in sorted(root.glob("*/case.json")):
        if KINDS[kind](path.parent, read_case(path.parent)):
            found.append(path.parent)
    return found


# What a case is follows from what lies in it, not from its name.
KINDS = {
    "forward": lambda directory, case: "microbatch_losses" in case and (directory / "tokens.npz").exists(),
    "trajectory": lambda directory, case: "iterations_per_rank" in case,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `forward_case` or `trajectory_case` run once per case found."""
    for kind in KINDS:
        fixture = f"{kind}_case"
        if fixture in metafunc.fixturenames:
            cases = find_cases(golden_root(metafunc.config), kind)
            missing = pytest.param(
                None, marks=pytest.mark.skip(reason="no golden cases of this kind: give --golden DIR")
            )
            metafunc.parametrize(fixture, cases or [missing], ids=lambda d: d.name if d else "none")


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    root = golden_root(request.config)
    if not root.is_dir():
        pytest.skip(f"no golden data in {root}: give --golden DIR")
    return root
