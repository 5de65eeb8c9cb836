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
from megatron.schedule.actions import Pipeline
from megatron.schedule.fill import most_fillers
from megatron.schedule.place import SLACK, Filling, best_fill
from megatron.schedule.simulate import Costs
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


FILLED = rows("<!-- filling: a test computes these anew -->")


@pytest.mark.parametrize("sizes", FILLED)
def test_filling(sizes: str) -> None:
    p, full = (int(word) for word in sizes.split(", "))
    heads = frozenset((p // 4, p // 2, p - 1))
    costs = [Costs(heads=0.5 if stage in heads else 0.0) for stage in range(p)]

    def most(slack: float) -> Filling:
        """With the most fillers beside so many full microbatches."""
        found = [
            best_fill(Pipeline(p, full + more, heads), costs, slack=slack) for more in range(2 * most_fillers(p) + 1)
        ]
        return max(
            (one for more, one in enumerate(found) if one.warmup + one.cooldown == more),
            key=lambda one: one.warmup + one.cooldown,
        )

    free, dear = most(SLACK), most(0.02)
    assert free.timeline.makespan <= free.plain.makespan * (1 + SLACK)
    longer = dear.timeline.makespan / dear.plain.makespan - 1
    counts = [one.warmup + one.cooldown for one in (free, dear)]
    assert FILLED[sizes] == [
        f"{free.plain.bubble_share:.1%}".replace("%", " %"),
        f"{counts[0]}, {counts[0] / full:.1%} of the full".replace("%", " %"),
        f"{counts[1]}, {counts[1] / full:.1%} of the full, {longer:.1%} longer".replace("%", " %"),
    ]


def test_filling_matters_for_few_microbatches() -> None:
    """Its share shrinks as steps grow."""
    shares: dict[str, list[float]] = {}
    for sizes, (_, free, dear) in FILLED.items():
        p, full = sizes.split(", ")
        shares.setdefault(p, []).append(int(dear.split(",")[0]) / int(full))
        assert int(free.split(",")[0]) <= int(dear.split(",")[0])
    for found in shares.values():
        assert len(found) >= 3 and found == sorted(found, reverse=True) and found[-1] < 0.1


def test_the_page_names_its_tables() -> None:
    assert len(re.findall(r"^<!-- (predicted|measured|filling):", PAGE, re.M)) == 3
