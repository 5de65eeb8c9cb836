"""Exits cost no logits: peak memory of a step with 3 exits against the same model without."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SIZES = {
    "vocab": 50304, "batch": 2, "seq_length": 256, "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4,
}  # fmt: skip


def measured(exits: list[int]) -> dict[str, int]:
    question = json.dumps({"exits": exits, "sizes": SIZES})
    command = [sys.executable, "-m", "megatron.testing.step_memory", question]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def test_three_exits_cost_their_own_state_and_at_most_5_percent() -> None:
    plain, exits = measured([]), measured([1, 2, 3])
    own_state = exits["state"] - plain["state"]
    logits = SIZES["batch"] * SIZES["seq_length"] * SIZES["vocab"] * 4
    assert own_state < 0.01 * plain["state"]  # tied heads: the test would prove nothing with much state of their own
    assert 3 * logits > 0.05 * plain["peak"]  # and holding the exits' logits would break the bound
    assert exits["peak"] <= plain["peak"] * 1.05 + own_state
