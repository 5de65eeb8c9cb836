"""Pins, ranges and the installer agree with each other."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.house.files import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FILES = ("requirements.txt", "tests/requirements.txt")
METADATA = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
INSTALLER = (ROOT / "examples" / "setup_env.sh").read_text(encoding="utf-8")


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(names: tuple[str, ...], python: str) -> dict[str, Version]:
    """Package -> version for one Python."""
    found: dict[str, Version] = {}
    for requirement in (pin for name in names for pin in pins(name)):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            package = canonicalize_name(requirement.name)
            assert package not in found, f"{package} is pinned twice for Python {python}"
            found[package] = Version(str(requirement.specifier).removeprefix("=="))
    return found


def ranges(key: str) -> list[Requirement]:
    """A list of requirements in pyproject.toml (Python 3.10 has no parser for it)."""
    return [
        Requirement(text)
        for text in re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*?)\]", METADATA, re.S | re.M)[1])
    ]


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_an_exact_pin(name: str) -> None:
    assert [str(pin) for pin in pins(name) if not re.fullmatch(r"==[\w.]+", str(pin.specifier))] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_lie_in_the_ranges(python: str) -> None:
    """Everything that the package needs is pinned, but torch; everything that the tests need, too."""
    run, test = pinned(FILES[:1], python), pinned(FILES, python)
    needed = [(r, run) for r in ranges("dependencies") + ranges("plot") + ranges("requires") if r.name != "torch"]
    for requirement, versions in needed + [(r, test) for r in ranges("test")]:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_the_installer_knows_the_same_torch() -> None:
    torch = next(r for r in ranges("dependencies") if r.name == "torch")
    installs = re.search(r"^TORCH=(.+)$", INSTALLER, re.M)[1]
    reuses = re.search(r"^TORCH_AT_LEAST=(.+)$", INSTALLER, re.M)[1]
    assert Version(installs) in torch.specifier
    assert str(torch.specifier) == f">={reuses}"


def test_pythons_are_named_alike() -> None:
    assert re.findall(r"Programming Language :: Python :: (3\.\d+)", METADATA) == list(PYTHONS)
    assert f'requires-python = ">={PYTHONS[0]}"' in METADATA
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| Python \|.*$", readme, re.M)[0]
    assert all(python in row for python in PYTHONS)
