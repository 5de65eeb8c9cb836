"""Model FLOPs against sums written out by hand."""

from megatron.config.model import ExitConfig, ModelConfig
from megatron.planning.flops import training_flops_per_token

VOCAB = 100


def flops(exits: ExitConfig | None = None, **changes: object) -> float:
    sizes = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16}
    return training_flops_per_token(ModelConfig(**(sizes | changes)), exits or ExitConfig(), VOCAB)


# per token: QKV 8 -> 24, output 8 -> 8, MLP 8 -> 32 -> 8, scores and values over (on average) 8 positions of width 8
LAYER = 2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8 + 8 * 8 + 8 * 8)
HEAD = 2 * 8 * VOCAB


def test_plain() -> None:
    assert flops() == 3 * (3 * LAYER + HEAD)


def test_exits() -> None:
    mlp = 2 * (8 * 32 + 32 * 8)
    assert flops(ExitConfig(exit_layer_nums=(1, 2))) == 3 * (3 * LAYER + 3 * HEAD)
    assert flops(ExitConfig(exit_layer_nums=(1,), use_exit_mlp=True)) == 3 * (3 * LAYER + 2 * HEAD + mlp)
    assert flops(ExitConfig(exit_layer_nums=(1,), use_exit_block=True)) == 3 * (4 * LAYER + 2 * HEAD)


def test_grouped_gated_windowed() -> None:
    """One key/value head of width 4, gate and up 8 -> 12 each, on average 4 positions seen."""
    layer = 2 * (8 * (8 + 4 + 4) + 8 * 8 + 2 * 8 * 12 + 12 * 8 + 4 * 8 + 4 * 8)
    grouped = {"group_query_attention": True, "num_query_groups": 1}
    assert flops(swiglu=True, ffn_hidden_size=12, window_size=4, **grouped) == 3 * (3 * layer + HEAD)
