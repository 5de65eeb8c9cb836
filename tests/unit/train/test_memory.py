"""Exits cost no logits: peak memory of a step with 3 exits against the same model without."""

from megatron.testing.step_memory import measure_in_fresh_process

SIZES = {
    "vocab": 50304, "batch": 2, "seq_length": 256, "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4,
}  # fmt: skip


def test_three_exits_cost_their_own_state_and_at_most_5_percent() -> None:
    plain, exits = (measure_in_fresh_process(exits, SIZES) for exits in ([], [1, 2, 3]))
    own_state = exits["state"] - plain["state"]
    logits = SIZES["batch"] * SIZES["seq_length"] * SIZES["vocab"] * 4
    assert own_state < 0.01 * plain["state"]  # tied heads: the test would prove nothing with much state of their own
    assert 3 * logits > 0.05 * plain["peak"]  # and holding the exits' logits would break the bound
    assert exits["peak"] <= plain["peak"] * 1.05 + own_state
