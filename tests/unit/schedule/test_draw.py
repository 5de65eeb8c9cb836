import sys
import xml.etree.ElementTree as ET

import pytest

from megatron.errors import ConfigError
from megatron.schedule.actions import Action, Op, Pipeline, Schedule, ScheduleError
from megatron.schedule.draw import COLOURS, TICKS, _ticks, figure, svg, text_timeline
from megatron.schedule.fill import fill_bubbles
from megatron.schedule.generate import interleaved, one_f_one_b, zero_bubble_h1
from megatron.schedule.simulate import Costs, Span, Timeline, simulate
from tests.unit.schedule.strategies import everywhere

PIPELINE = Pipeline(4, 8, frozenset({1, 3}))
COSTS = [Costs(heads=0.5)] * 4
EXITS = ("1F1B with exits", simulate(one_f_one_b(PIPELINE), COSTS))
FILLED = ("filled & <drawn>", simulate(fill_bubbles(Pipeline(4, 8, frozenset(range(4))), 2, 2), COSTS))
SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture):
    """The boxes of actions: a group each, with a title."""
    return [group.find(f"{SVG}rect") for group in ET.fromstring(picture).iter(f"{SVG}g")]


def texts(picture):
    return ["".join(text.itertext()) for text in ET.fromstring(picture).iter(f"{SVG}text")]


def test_text():
    timeline = simulate(one_f_one_b(Pipeline(2, 2, frozenset({1}))), [Costs()] * 2)
    assert text_timeline(timeline).splitlines() == [
        "rank 0 F0 F1 .  .  B0 -- .  B1 --",
        "rank 1 .  F0 B0 -- F1 B1 -- .  .",
    ]
    quarters = text_timeline(simulate(one_f_one_b(Pipeline(1, 1, frozenset({0}))), [Costs(heads=0.5)]), unit=0.5)
    assert quarters == "rank 0 F0 -- E0 B0 -- -- --\n"
    assert text_timeline(Timeline(((), ()))) == "rank 0\nrank 1\n"


def test_every_action_is_a_box_in_its_colour():
    found = boxes(svg([EXITS]))
    assert len(found) == 4 * 16 + 2 * 8
    fills = [box.get("fill") for box in found]
    assert fills.count(COLOURS[Op.HEADS][0]) == 16
    assert len({COLOURS[op][0] for op in COLOURS}) == len(COLOURS)
    width = float(ET.fromstring(svg([EXITS])).get("width"))
    assert all(float(box.get("x")) > 0 and float(box.get("x")) + float(box.get("width")) < width for box in found)


def test_boxes_of_a_rank_do_not_overlap():
    rows = {}
    for box in boxes(svg([EXITS, FILLED])):
        rows.setdefault(box.get("y"), []).append((float(box.get("x")), float(box.get("width"))))
    assert len(rows) == 8
    for row in rows.values():
        for (x, width), (following, _) in zip(sorted(row), sorted(row)[1:], strict=False):
            assert x + width <= following + 0.02


def test_words_and_numbers():
    words = texts(svg([EXITS, FILLED], "ms"))
    assert "filled & <drawn>step 24 ms, 14.6% idle" in words
    assert {"rank 0", "rank 3", "forward", "exit heads", "backward", "fills a bubble", "7"} <= set(words)
    assert "backward, weights" not in words
    assert "fills a bubble" not in texts(svg([EXITS]))
    assert {"backward, inputs", "backward, weights"} <= set(
        texts(svg([("", simulate(zero_bubble_h1(everywhere(4, 8)), COSTS))]))
    )


def test_a_time_axis_has_a_few_round_ticks_and_the_unit():
    words = texts(svg([EXITS, FILLED], "ms"))
    assert words.count("ms") == 1
    assert {"10", "15", "20"} <= set(words), "more than the microbatches' numbers"
    for longest in (7.3, 0.0042, 36.0, 8.0, 1e6):
        ticks = _ticks(longest)
        assert ticks[0] == 0 and 4 <= len(ticks) <= TICKS + 1 and longest - ticks[1] < ticks[-1] <= longest * (1 + 1e-9)
        assert f"{ticks[1]:e}"[:8] in ("1.000000", "2.000000", "5.000000")


def test_figures_of_a_part_are_what_is_given():
    words = texts(svg([EXITS, FILLED], "ms", ["a third of it", "12 ms of 40 ms"]))
    assert "1F1B with exitsa third of it" in words and "filled & <drawn>12 ms of 40 ms" in words


def test_fillers_have_a_dashed_edge():
    dashed = [box for box in boxes(svg([FILLED])) if box.get("stroke-dasharray")]
    # Two fillers on 2 + 1 stages with F, E, B; two others with F everywhere and E, B on 2 + 1 stages.
    assert len(dashed) == 3 * 3 + 8 + 3 * 2


def test_later_stages_of_a_rank_are_paler():
    timeline = simulate(interleaved(Pipeline(2, 4, frozenset({3}), 2)), [Costs()] * 4)
    assert {box.get("fill-opacity") for box in boxes(svg([("interleaved", timeline)]))} == {"1.00", "0.60"}


def test_what_takes_no_time_is_left_out_and_narrow_boxes_have_no_number():
    spans = (
        Span(Action(0, Op.RECV_F, 3), 0.0, 0.0),
        Span(Action(0, Op.FORWARD, 3), 0.0, 1000.0),
        Span(Action(0, Op.SEND_F, 3), 1000.0, 1000.5),
    )
    picture = svg([("measured", Timeline((spans,)))])
    assert len(boxes(picture)) == 2
    assert texts(picture).count("3") == 1


def test_nothing_to_draw():
    for panels in ([], [("empty", simulate(Schedule(((),)), []))]):
        with pytest.raises(ScheduleError, match="nothing to draw"):
            svg(panels)


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    made = figure([EXITS, FILLED], "ms")
    assert [axes.get_title(loc="left").split("   ")[0] for axes in made.axes] == ["1F1B with exits", "filled & <drawn>"]
    assert [text.get_text() for text in made.legends[0].get_texts()] == [
        "forward", "exit heads", "backward", "fills a bubble",
    ]  # fmt: skip
    assert [axes.get_xlabel() for axes in made.axes] == ["", "time, ms"]
    made.savefig(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_figure_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'ee-llm\[plot\]'"):
        figure([EXITS])
