from itertools import pairwise

from megatron.config.model import ExitConfig
from megatron.exits.spec import exit_specs
from megatron.exits.weights import exit_weight


def test_positional_lists_follow_their_exits_when_sorted():
    specs = exit_specs(
        ExitConfig(
            exit_layer_nums=(6, 2),
            exit_layer_weight=(0.6, 0.2),
            exit_layer_weight_init=(0.1, 0.0),
            exit_layer_temperature=(3.0, 1.5),
        )
    )
    assert [(s.label, s.layer, s.weight, s.weight_init, s.temperature) for s in specs] == [
        ("2", 1, 0.2, 0.0, 1.5),
        ("6", 5, 0.6, 0.1, 3.0),
    ]


def test_taps():
    assert exit_specs(ExitConfig(exit_layer_nums=(1,)))[0].tap == "output"
    assert exit_specs(ExitConfig(exit_layer_nums=(1,), pre_exit=True))[0].tap == "input"
    assert exit_specs(ExitConfig(exit_layer_nums=(1,), use_exit_mlp=True))[0].tap == "mlp"


def test_weight_warmup_ends_at_its_target_and_cools_down():
    (spec,) = exit_specs(ExitConfig(exit_layer_nums=(1,), exit_layer_weight=(0.2,), exit_layer_weight_init=(1.0,)))
    for style in ("linear", "cosine"):
        values = [exit_weight(spec, step, 10, style) for step in range(15)]
        assert values[0] == 1.0
        assert values[10:] == [0.2] * 5
        assert all(a > b for a, b in pairwise(values[:11]))
    assert exit_weight(spec, 5, 10, "linear") == 0.6
    assert exit_weight(spec, 0, 0, "linear") == 0.2
