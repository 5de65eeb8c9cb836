"""The numbers of EXIT_COSTS.md: predicted ones computed anew, measured ones as in the kept result."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.config.load import load
from megatron.config.model import ExitConfig, ModelConfig
from megatron.planning.device import preset
from megatron.planning.estimate import Setup, estimate
from megatron.planning.flops import head_flops, layer_flops, training_flops_per_token
from tests.house.files import ROOT

PAGE = (ROOT / "EXIT_COSTS.md").read_text(encoding="utf-8")
SCRIPTS = {"1.3B": "1-3B", "7B": "7B", "13B": "13B", "30B": "30B"}
ROWS = 32000


def rows(after: str) -> dict[str, list[str]]:
    """Of the first table after some words, by their first cell."""
    table = PAGE.partition(after)[2].strip().split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {first: rest for first, *rest in cells}


def script_setup(name: str, echo: Path, pp: str) -> Setup:
    """What a launch script asks for, on 64 devices."""
    given = {"DATA_PATH": "d", "TOKENIZER_PATH": "t", "CHECKPOINT_PATH": "c", "GPUS_PER_NODE": "64", "PP": pp}
    path = ROOT / "examples" / "ee_training" / f"{SCRIPTS[name]}.sh"
    done = subprocess.run(
        ["bash", path], env={**os.environ, **given, "PYTHON": str(echo)}, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    config = load(words[words.index("pretrain_early_exit_gpt.py") + 1 :]).config
    return Setup(config, 64, ROWS, preset("A100-80GB", "bfloat16"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_predicted(name: str, tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    echo.chmod(0o755)
    found = []
    for pp in ("1", "4"):
        setup = script_setup(name, echo, pp)
        without = replace(setup, config=replace(setup.config, exits=ExitConfig()))
        found.append((estimate(setup), estimate(without)))
    (one, one_without), (four, four_without) = found
    model = setup.config.model
    width, ratio = rows("fewer in wider models:")[name]
    assert (int(width), ratio) == (model.hidden_size, f"{head_flops(model, ROWS) / layer_flops(model, 2048):.2f}")
    assert rows("<!-- predicted: a test computes these anew -->")[name] == [
        f"+{one.step / one_without.step - 1:.1%}".replace("%", " %"),
        f"+{four.step / four_without.step - 1:.1%}".replace("%", " %"),
        f"{four_without.memory / 1e9:.1f} GB, {four.memory / 1e9:.1f} GB",
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_measured(count: int) -> None:
    kept = json.loads((ROOT / "benchmarks/results/train_step_cpu.json").read_text())["figures"]
    figures = {figure["name"]: figure for figure in kept}
    model = ModelConfig(
        num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, seq_length=256, swiglu=True
    )
    plain, exits = (
        training_flops_per_token(model, ExitConfig(exit_layer_nums=numbers), 8192)
        for numbers in ((), tuple(range(1, count + 1)))
    )
    time = figures[f"step with {count} exits / FLOP prediction"]
    low, high = time["quartiles"]
    predicted, scaled = exits / plain, [exits / plain * value for value in (time["value"], low, high)]
    memory = figures[f"peak memory with {count} exits / without + own state"]["value"]
    assert rows("<!-- measured: a test reads these from the result -->")[str(count)] == [
        f"{predicted:.3f}",
        "{:.3f} ({:.3f}–{:.3f})".format(*scaled),
        f"{memory:.3f}",
    ]


def test_the_page_names_its_tables() -> None:
    assert len(re.findall(r"^<!-- (predicted|measured):", PAGE, re.M)) == 2
