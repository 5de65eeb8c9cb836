"""tools/plan_pipeline.py: what it prints, writes and refuses."""

import json
import re
from pathlib import Path

import pytest

from megatron.cli.plan_pipeline import main
from megatron.config.load import load

MODEL = """--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 128 --exit-layer-nums 2 4
    --micro-batch-size 2 --global-batch-size 32 --bf16 --padded-vocab-size 1024"""


def test_a_plan(tmp_path: Path, capsys) -> None:
    picture, numbers = tmp_path / "plan.svg", tmp_path / "plan.json"
    words = ["--num-gpus", "4", *MODEL.split(), "--pp", "2", "4", "--draw", str(picture), "--output", str(numbers)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert re.search(r"6\.\d+M parameters on 4 x A100-80GB", text) and "given" in text
    best = json.loads(numbers.read_text())["best"]
    assert len(best) == 5 and best[0]["step"] <= best[1]["step"] and all(one["fits"] for one in best)
    assert best[0]["ranks"][0]["stages"][0]["first"] == 1
    chosen = load([*MODEL.split(), *best[0]["flags"]]).config
    assert chosen.parallel.pipeline_model_parallel_size == best[0]["pp"] and chosen.training.micro_batch_size == 2
    assert picture.read_text().startswith("<svg")
    losing = text.partition("The fastest of each schedule and division of layers:\n")[2].partition("\n\n")[0]
    assert all(f" {schedule} " in f" {losing}" for schedule in ("gpipe", "1f1b", "interleaved", "zb-h1"))
    assert "memory by stage, MB" in losing


def test_a_picture_of_a_part_says_of_what(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "plan.svg"
    words = [*MODEL.split(), "--pp", "2", "--tp", "1", "--schedules", "1f1b+fill", "--recompute", "none"]
    assert main(["--num-gpus", "2", *words, "--draw", str(picture)]) == 0
    drawn, text = picture.read_text(), capsys.readouterr().out
    assert "6 of 16 microbatches" in drawn and re.search(r"[\d.]+ m?s of [\d.]+ m?s, [\d.]+% idle in all", drawn)
    assert "step " not in drawn, "a part is no step"
    told = re.search(r"1f1b\+fill \((\d) warm-up and (\d) cool-down fillers\)", drawn)
    assert told and told[0] in text
    assert f"--num-fill-warmup-microbatches {told[1]} --num-fill-cooldown-microbatches {told[2]}" in text


def test_interleaved_layouts_ask_for_several_queues(capsys) -> None:
    words = ["--num-gpus", "2", *MODEL.split(), "--tp", "1", "--pp", "2"]
    assert main([*words, "--schedules", "interleaved"]) == 0
    assert "leave CUDA_DEVICE_MAX_CONNECTIONS=1 unset" in capsys.readouterr().out
    assert main([*words, "--schedules", "1f1b"]) == 0
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in capsys.readouterr().out


def test_a_picture_as_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert main(["--num-gpus", "2", *MODEL.split(), "--tp", "1", "--pp", "2", "--draw", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-gpus", "0"], "--num-gpus, --best, --tp and --pp are 1 or more"),
        (["--num-gpus", "2", "--device", "abacus"], "--device abacus is not known"),
        (["--num-gpus", "2", "--device-memory", "0.05"], "no layout fits: the nearest, tp=2"),
        (["--num-gpus", "2", "--num-layer", "3"], "did you mean --num-layers?"),
        (["--num-gpus", "2", "--draw", "plan.txt"], "give a name that ends in .svg or .png"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], said: str, capsys) -> None:
    assert main([*MODEL.split(), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_batch_has_to_be_known(capsys) -> None:
    words = MODEL.split()
    at = words.index("--global-batch-size")
    assert main(["--num-gpus", "2", *words[:at], *words[at + 2 :]]) == 2
    assert "give --global-batch-size" in capsys.readouterr().err


def test_the_vocabulary_has_to_be_known(capsys) -> None:
    assert main(["--num-gpus", "1", *MODEL.split()[:-2]]) == 2
    assert "give --padded-vocab-size" in capsys.readouterr().err
    assert (
        main(["--num-gpus", "1", *MODEL.split()[:-2], "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]) == 0
    )
