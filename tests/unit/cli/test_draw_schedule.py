"""tools/draw_schedule.py: timelines as text and pictures."""

from pathlib import Path

import pytest

from megatron.cli.draw_schedule import NAMES, main


def test_text(capsys) -> None:
    assert main(["--stages", "2", "--microbatches", "2", "--head", "1", "--exits", "0"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "1F1B, heads before each backward: step 11, 27.3% idle"
    assert text.splitlines()[1].split()[:6] == ["rank", "0", "F0", "--", "F1", "--"]


def test_every_schedule_has_a_panel(tmp_path: Path) -> None:
    picture = tmp_path / "all.svg"
    assert main(["--schedules", *NAMES, "--microbatches", "9", "--exits", "0", "1", "--output", str(picture)]) == 0
    assert all(title.replace("&", "&amp;") in picture.read_text() for title in NAMES.values())


def test_an_exit_on_each_stage_takes_no_more_time_than_none(capsys) -> None:
    """The last stage has a head anyway, and nobody is faster than the slowest."""
    assert main(["--schedules", "plain", "1f1b", "--exits", "0", "1", "2"]) == 0
    plain, exits = (
        line.split("step ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines() if "step" in line
    )
    assert plain == exits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--exits", "4"], "the stages are 0 to 3"),
        (["--stages", "0"], "--stages, --microbatches and --chunks are 1 or more"),
        (["--output", "a.gif"], "give a name that ends in .svg or .png"),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
