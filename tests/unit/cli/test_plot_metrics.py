"""tools/plot_metrics.py: curves read from metrics files as they occur, and the picture made of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.cli.plot_metrics import draw, main, read_metrics, smooth


def record(iteration: int, **values: float | None) -> dict:
    return {"iteration": iteration, "consumed_tokens": iteration * 100, "consumed_samples": iteration * 2, **values}


def training(iterations: int = 40) -> list[dict]:
    rows = []
    for i in range(1, iterations + 1):
        losses = {"loss/exit_12": 3 + 5 / i, "loss/exit_3": 3.5 + 5 / i, "loss/final": 2.9 + 5 / i}
        rows.append(record(i, **losses, **{"weight/exit_3": 0.3}, lr=1e-3))
    return rows


def evaluation(iteration: int, shift: float = 0.0) -> dict:
    names = {"exit_3": 3.6, "exit_12": 3.1, "final": 3.0}
    return {"iteration": iteration, "run": 0} | {f"eval/loss/{n}": v + shift for n, v in names.items()}


def write(path: Path, rows: list[dict], ending: str = "\n") -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + ending)
    return path


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return write(tmp_path / "metrics.jsonl", [*training(), evaluation(20, 0.5), evaluation(40)])


def texts(heads: list) -> list[str]:
    (axes,) = draw(heads, "A title").axes
    return [text.get_text() for text in axes.texts]


def test_heads_shallow_first_with_positions_in_tokens(metrics: Path) -> None:
    heads = read_metrics(metrics)
    assert [head.title for head in heads] == ["exit 3", "exit 12", "full model"]
    assert heads[0].x.tolist() == [100 * i for i in range(1, 41)]
    assert heads[0].loss[0] == 8.5
    assert heads[2].eval_x.tolist() == [2000, 4000]
    assert heads[2].eval_loss.tolist() == [3.5, 3.0]


@pytest.mark.parametrize(("axis", "last"), [("tokens", 4000), ("samples", 80), ("iterations", 40)])
def test_x_axis(metrics: Path, axis: str, last: int) -> None:
    head = read_metrics(metrics, axis)[0]
    assert head.x[-1] == head.eval_x[-1] == last


def test_repeated_iterations_skipped_steps_and_a_line_being_written(tmp_path: Path) -> None:
    rows = [record(1, **{"loss/final": 9.0}), record(2, **{"loss/final": None}), record(1, **{"loss/final": 5.0})]
    path = write(tmp_path / "m.jsonl", rows, ending='\n{"iteration": 3, "lo')
    (head,) = read_metrics(path)
    assert head.loss.tolist() == [5.0]
    assert head.last == 5.0


def test_test_data_are_no_head(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [record(1, **{"loss/final": 2.0}), {"iteration": 1, "test/loss/final": 1.0}])
    assert [head.name for head in read_metrics(path)] == ["final"]


def test_smoothing_keeps_lines_straight_and_averages_noise() -> None:
    assert smooth(np.full(7, 2.0)).tolist() == [2.0] * 7
    line = np.arange(1000.0)
    np.testing.assert_allclose(smooth(line)[100:-100], line[100:-100])
    noise = np.random.default_rng(0).normal(size=4000)
    assert smooth(noise).std() < 0.15 * noise.std()
    assert smooth(np.array([])).size == 0


def test_curves_are_named_at_their_ends_and_apart(metrics: Path) -> None:
    heads = read_metrics(metrics)
    assert sorted(texts(heads)) == ["exit 12  3.10", "exit 3  3.60", "full model  3.00"]
    (axes,) = draw(heads, "A title").axes
    assert axes.get_title(loc="left") == "A title"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["training, smoothed", "held-out text"]
    heights = sorted(text.xy[1] for text in axes.texts)
    low, high = axes.get_ylim()
    assert min(np.diff(heights)) > 0.05 * (high - low)
    assert low < 3.0 and high < 8, "the first steps would press the curves together"


def test_without_evaluation_the_training_loss_is_named(tmp_path: Path) -> None:
    heads = read_metrics(write(tmp_path / "m.jsonl", training()))
    (axes,) = draw(heads, "A title").axes
    assert len(axes.get_legend().get_texts()) == 1
    assert "full model  3.03" in texts(heads)


def test_one_line_of_metrics_can_be_drawn(tmp_path: Path) -> None:
    assert texts(read_metrics(write(tmp_path / "m.jsonl", training(1)))) != []


@pytest.mark.parametrize(
    ("name", "start"), [("a b.png", b"\x89PNG"), ("deep/down/p.svg", b"<?xml"), ("p.pdf", b"%PDF")]
)
def test_pictures(metrics: Path, tmp_path: Path, name: str, start: bytes) -> None:
    output = tmp_path / "out" / name
    assert main(["--metrics-file", str(metrics), "--output", str(output), "--log-x"]) == 0
    assert output.read_bytes().startswith(start)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("content", "output", "code", "message"),
    [
        (None, "p.png", 2, "cannot be read"),
        ("", "p.png", 2, "holds no loss yet"),
        ('{"iteration": 1, "lr": 1}\n', "p.png", 2, "holds no loss yet"),
        ('not json\n{"iteration": 1}\n', "p.png", 2, "line 1: no line of a metrics file"),
        ('[1]\n{"iteration": 1}\n', "p.png", 2, "line 1: no line of a metrics file"),
        ('{"iteration": 1, "loss/final": 2.0, "consumed_tokens": 5}\n', "p.txt", 2, "ends in .png"),
        ('{"iteration": 1, "loss/final": 2.0, "consumed_tokens": 5}\n', "m.jsonl/p.png", 5, "cannot be written"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, output: str, code: int, message: str
) -> None:
    metrics = tmp_path / "m.jsonl"
    if content is not None:
        metrics.write_text(content)
    assert main(["--metrics-file", str(metrics), "--output", str(tmp_path / output)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("p.*"))


def test_what_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    lines = ['"loss/final": 3.0', '"loss/final": NaN', '"loss/final": "high"', '"loss/final": 2.0']
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"iteration": {i}, "consumed_tokens": {i}, {line}}}\n' for i, line in enumerate(lines)))
    (head,) = read_metrics(path)
    assert head.loss.tolist() == [3.0, 2.0]
