"""The drawn timelines are what the commands beside them draw."""

import re
import shlex
from pathlib import Path

import pytest

from megatron.cli.draw_schedule import main
from tests.house.files import ROOT

COMMANDS = re.findall(r"^python tools/draw_schedule\.py (.*)$", (ROOT / "images/README.md").read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_pictures_are_drawn_anew_alike(command: str, tmp_path: Path) -> None:
    *words, _, kept = shlex.split(command)
    assert main([*words, "--output", str(tmp_path / "drawn.svg")]) == 0
    assert (tmp_path / "drawn.svg").read_text() == (ROOT / kept).read_text(), f"draw it again: {command}"


def test_every_timeline_has_its_command() -> None:
    kept = {path.name for path in (ROOT / "images").glob("pipeline_*.svg")}
    assert kept == {shlex.split(command)[-1].removeprefix("images/") for command in COMMANDS}
