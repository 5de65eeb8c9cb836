"""The quickstart: what it collects, what it decides, what it says; with -m slow, the whole quick way."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import collect_text
import compare_exits
import pytest
import run as quickstart
import sizes
from progress import TrainingProgress, clock

from megatron.config.load import load
from megatron.inference.measure import Comparison
from megatron.inference.request import Result, Token

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "examples" / "quickstart"


# collecting text


def collect(directory: Path, megabytes: float) -> dict[str, list[dict]]:
    collect_text.collect(directory, int(megabytes * 1e6))
    return {path.stem: [json.loads(line) for line in path.open()] for path in directory.glob("*.jsonl")}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    return collect(tmp_path_factory.mktemp("text") / "first", 2)


def test_collecting_twice_gives_the_same(collected: dict[str, list[dict]], tmp_path: Path) -> None:
    assert collect(tmp_path / "second", 2) == collected


def test_held_out_files_are_never_trained_on(collected: dict[str, list[dict]]) -> None:
    files = {
        part: {record["source"] for kind in ("prose", "code") for record in collected[f"{part}_{kind}"]}
        for part in ("train", "heldout")
    }
    assert files["train"] and files["heldout"]
    assert not files["train"] & files["heldout"]
    paragraphs = {
        part: {p for record in collected[f"{part}_prose"] for p in record["text"].split("\n\n")} for part in files
    }
    assert not paragraphs["train"] & paragraphs["heldout"]


def test_amounts(collected: dict[str, list[dict]]) -> None:
    size = {name: sum(len(record["text"]) for record in records) for name, records in collected.items()}
    assert 2e6 <= sum(size.values()) < 3e6
    assert size["train_prose"] > 0.2 * size["train_code"], "the language reference comes first"
    held_out = (size["heldout_prose"] + size["heldout_code"]) / sum(size.values())
    assert 0.01 < held_out < 0.25, "files are dealt by hash, and each Python version has other files"


def test_the_standard_library_has_ten_megabytes() -> None:
    sources = next(iter(collect_text.stages()))
    assert sum(source.path.stat().st_size for source in sources) > 9e6
    assert not any("test" in Path(source.name).parts or "encodings" in source.name for source in sources)


def test_copies_of_a_module_stay_on_one_side() -> None:
    def part(name: str) -> str:
        return collect_text.Source(Path(name), name).part

    names = [f"module_{i}.py" for i in range(500)]
    parts = [part(name) for name in names]
    assert parts == [part(f"some/vendored/{name}") for name in names]
    assert 10 < parts.count("heldout") < 100
    assert part("pydoc_data/topics.py") == "train"
    assert len({part(f"package_{i}/__init__.py") for i in range(100)}) == 2


def test_prose_is_language_only() -> None:
    text = '''
"""The module docstring says in one whole sentence what this is about.

>>> this_is(an, example), not, a, sentence, in, the, sense, of, this, test

{'a': 1, 'b': [2, 3]}; x = 5 + 6 / 7; y = (8, 9, 10); z = {11: 12}; print(x, y, z)
"""
# A comment that runs over two lines and is
# long enough to read like language.
x = "a string that is not a docstring, though it reads like one to everybody"
'''
    found = list(collect_text.prose(text, ast.parse(text)))
    assert [paragraph.split()[0] for paragraph in found] == ["The", "A"]
    assert found[1] == "A comment that runs over two lines and is\nlong enough to read like language."
    assert any("everybody" in p for p in collect_text.prose(text, ast.parse(text), all_strings=True))


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe\x00", b"0123456789, " * 99, b"x = 1\0"])
def test_what_is_no_program_is_passed_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.py"
    path.write_bytes(content)
    collection = collect_text.Collection(tmp_path / "out")
    collection.add(collect_text.Source(path, "file.py"))
    assert collection.total() == 0


def test_collecting_writes_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(
        [sys.executable, HERE / "collect_text.py", "--output", tmp_path / "file" / "text", "--megabytes", "0.1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 5 and done.stderr.startswith("error: cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_collecting_replaces_its_own_files_only(tmp_path: Path) -> None:
    words = [sys.executable, HERE / "collect_text.py", "--output", tmp_path / "text", "--megabytes", "0.1"]
    for _ in range(2):  # the second run replaces what the first one wrote
        assert subprocess.run(words, capture_output=True).returncode == 0
    (tmp_path / "text" / "thesis.tex").write_text("mine")
    refused = subprocess.run(words, capture_output=True, text=True)
    assert refused.returncode == 2 and "thesis.tex" in refused.stderr
    assert (tmp_path / "text" / "thesis.tex").read_text() == "mine"


# deciding


@pytest.mark.parametrize(
    ("minutes", "quick", "gpu"), [(None, False, False), (60, False, False), (None, True, False), (5, False, True)]
)
def test_plans_are_flags_that_the_program_takes(minutes: float | None, quick: bool, gpu: bool) -> None:
    plan = sizes.choose(minutes, quick, gpu)
    plan = sizes.replace(plan, iterations=sizes.fit(plan, 5000, 4_000_000))
    loaded = load(plan.training_flags(), "test", None).config
    assert loaded.exits.exit_layer_nums == plan.exit_layers
    assert [4 * n for n in plan.exit_layers] == [plan.num_layers, 2 * plan.num_layers]
    assert plan.iterations % plan.evaluations == 0 and plan.iterations > 0
    assert loaded.learning_rate.lr_warmup_iters < plan.iterations


def test_longer_means_larger() -> None:
    small, large = (sizes.choose(minutes, quick=False, gpu=False) for minutes in (None, 60))
    assert large.num_layers * large.hidden_size > small.num_layers * small.hidden_size
    assert large.megabytes > small.megabytes
    assert sizes.choose(3, quick=False, gpu=False) == sizes.replace(small, minutes=3)


def test_iterations_fit_the_time_and_the_text() -> None:
    plan = sizes.choose(None, quick=False, gpu=False)
    for speed in (2000, 8000, 20_000):
        tokens = sizes.fit(plan, speed, 10**9) * plan.tokens_per_iteration
        assert 0.8 * 300 * speed < tokens <= 300 * speed
    assert sizes.fit(plan, 10**6, 100_000) * plan.tokens_per_iteration <= plan.max_passes * 100_000
    assert sizes.fit(plan, 1, 10**9) > 0


@pytest.mark.parametrize(
    ("env", "minutes", "quick", "directory"),
    [
        ({}, None, False, "quickstart-run"),
        ({"QUICK": "0", "MINUTES": "", "RUN_DIR": ""}, None, False, "quickstart-run"),
        ({"QUICK": "1"}, None, True, "quickstart-run/quick"),
        ({"MINUTES": "60"}, 60, False, "quickstart-run/60-minutes"),
        ({"MINUTES": "0.5", "RUN_DIR": "/a b"}, 0.5, False, "/a b"),
    ],
)
def test_wishes(env: dict, minutes: float | None, quick: bool, directory: str) -> None:
    assert quickstart.Wish.read(env) == quickstart.Wish(minutes, quick, ROOT / directory)


@pytest.mark.parametrize("env", [{"MINUTES": "five"}, {"MINUTES": "-1"}, {"MINUTES": "nan"}, {"MINUTES": "inf"}])
def test_bad_wishes(env: dict) -> None:
    with pytest.raises(quickstart.QuickstartError, match="MINUTES="):
        quickstart.Wish.read(env)


def test_contradicting_wishes() -> None:
    with pytest.raises(quickstart.QuickstartError, match="contradict"):
        quickstart.Wish.read({"QUICK": "1", "MINUTES": "5"})


def test_a_directory_belongs_to_one_wish(tmp_path: Path) -> None:
    quickstart.Quickstart(quickstart.Wish(None, True, tmp_path))
    quickstart.Quickstart(quickstart.Wish(None, True, tmp_path))
    with pytest.raises(quickstart.QuickstartError, match="name another RUN_DIR"):
        quickstart.Quickstart(quickstart.Wish(60, False, tmp_path))
    (tmp_path / "plan.json").write_text('{"minutes": 5, "unknown": 1}')
    with pytest.raises(quickstart.QuickstartError, match="another version"):
        quickstart.Quickstart(quickstart.Wish(None, True, tmp_path))
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(quickstart.QuickstartError, match=r"plan\.json cannot be read"):
        quickstart.Quickstart(quickstart.Wish(None, True, tmp_path))


# running and saying


def test_what_ended_a_child() -> None:
    assert quickstart._why(-9, "loss: 3.2") == "killed by SIGKILL; often the system ended it for want of memory"
    assert quickstart._why(-15, "") == "killed by SIGTERM"
    assert quickstart._why(2, "started\nerror: --lr: no number") == "--lr: no number"
    assert quickstart._why(1, "") == "exit code 1"


def test_a_failing_command_is_one_message_and_not_noted_as_done(tmp_path: Path) -> None:
    run = quickstart.Quickstart(quickstart.Wish(None, True, tmp_path / "a b"))
    words = ("--input", "/not/there", "--vocab-size", 300, "--output", "x")
    with pytest.raises(quickstart.QuickstartError, match=r"train_tokenizer\.py: --input .* no such file .*\.log"):
        run._call("tokenizer", "tools/train_tokenizer.py", *words, watch=lambda: None)
    assert not (run.directory / "steps.json").exists()
    assert "--input /not/there" in (run.directory / "commands.sh").read_text()


def test_progress_is_read_from_a_growing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = tmp_path / "m.jsonl"
    metrics.write_text('{"iteration": 5, "loss/final": 9.0}\n')
    progress = TrainingProgress(metrics, 20, 1000)
    progress.update()
    assert progress.iteration == 0, "lines of an earlier start do not count"
    row = {"loss/exit_10": 2.5, "loss/exit_2": 3.0, "loss/final": None, "step_time_s": 0.5}
    with metrics.open("a") as file:
        for i in range(11, 16):
            file.write(json.dumps({"iteration": i, **row, "loss/final": 2.0}) + "\n")
        file.write('{"iteration": 15, "eval/loss/final": 1.0}\n{"iteration": 16, "lo')
        file.flush()
        progress.update()
    progress.close()
    assert progress.iteration == 15
    assert progress.line() == " 75%  0.01M tokens, 2,000 a second; loss: exit 2 3.00, exit 10 2.50, full 2.00"
    assert capsys.readouterr().out.count("left") == 1
    assert (clock(59.6), clock(605), clock(-3)) == ("1:00", "10:05", "0:00")


def row(threshold: float | None, speed_up: float, agreement: float) -> Comparison:
    shares = {"3": 0.4, "6": 0.1, "final": 0.5}
    return Comparison(threshold, 100 * speed_up, speed_up, shares, agreement, 0.5, 0.7, 1.0)


def test_verdict() -> None:
    full, slow, wild = row(None, 1.0, 1.0), row(0.9, 1.1, 0.99), row(0.1, 3.0, 0.6)
    good = compare_exits.verdict([full, slow, row(0.5, 1.42, 0.961), wild])
    assert good.startswith("At threshold 0.5") and "1.42 times" in good and "96.1%" in good
    missed = compare_exits.verdict([full, slow, wild])
    assert missed.startswith("No threshold is 1.3x as fast with 95% agreement")
    assert "0.9 with 1.10x at 99.0%" in missed
    assert "nearest" not in compare_exits.verdict([full, wild])


def test_distinct_3() -> None:
    def result(*ids: int) -> Result:
        return Result(tuple(Token(i, "final", 0.5, -0.7, 0.1, 1, 1) for i in ids), "", "length")

    assert compare_exits.distinct_3([result(*range(20)), result(*range(30, 50))]) == 1
    assert compare_exits.distinct_3([result(*[7] * 30)]) == pytest.approx(1 / 28)
    assert compare_exits.distinct_3([result(1, 2)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_quick_way(tmp_path: Path) -> None:
    """From text to table in 90 s, in a directory with a blank, from elsewhere; a second run repeats the last steps."""
    directory = tmp_path / "a run"
    script = str(ROOT / "examples" / "quickstart.sh")
    env = {name: value for name, value in os.environ.items() if name not in ("MINUTES", "OMP_NUM_THREADS")}
    subprocess.run(["bash", str(ROOT / "examples" / "setup_env.sh")], check=True)
    outputs = []
    for _ in range(2):
        started = time.monotonic()
        done = subprocess.run(
            ["bash", script], cwd=tmp_path, env=env | {"QUICK": "1", "RUN_DIR": "a run"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert time.monotonic() - started <= 90
        outputs.append(done.stdout)
    assert (directory / "losses.png").read_bytes().startswith(b"\x89PNG")
    table = (directory / "table.txt").read_text()
    assert "full model" in table and "agreement" in table
    assert table in outputs[-1]  # the second run has measured again
    assert "distinct-3" in (directory / "samples.txt").read_text()
    results = json.loads((directory / "results.json").read_text())
    assert results["rows"][0]["agreement"] == 1.0
    assert outputs[1].count("done before") == 5
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    losses = [line["loss/final"] for line in rows if "loss/final" in line]
    assert losses[-1] < losses[0] - 1
    assert not list(directory.rglob("*.tmp"))
