"""Which rate drops what: the hidden one embedding and both branches of a layer, the other attention weights."""

import pytest
import torch
import torch.nn.functional as F

from megatron.config.model import ExitConfig
from megatron.model.stage import Stage
from megatron.parallel.rng import DropoutStream
from megatron.testing.tiny import build_gpt, model_config, random_batch


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Fills with the rate of every dropout that a forward pass asks torch for."""
    seen: dict[str, list[float]] = {"hidden": [], "attention": []}
    plain_dropout, plain_attention = F.dropout, F.scaled_dot_product_attention

    def dropout(x: torch.Tensor, p: float = 0.5, *args, **options) -> torch.Tensor:
        seen["hidden"].append(p)
        return plain_dropout(x, p, *args, **options)

    def attention(*args, dropout_p: float = 0.0, **options) -> torch.Tensor:
        seen["attention"].append(dropout_p)
        return plain_attention(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return seen


def forward(exits: ExitConfig, training: bool, hidden: float, attention: float) -> None:
    config = model_config(attention_dropout=attention, hidden_dropout=hidden)
    model = build_gpt(config, exits)
    model.train(training)
    stage, batch = Stage(model), random_batch()
    activations = stage.forward(batch, DropoutStream(1, 0, 0) if training else None)
    for label in model.head_labels():
        model.features(label, activations.taps[label], activations.context)


@pytest.mark.parametrize(("hidden", "attention"), [(0.5, 0.0), (0.0, 0.25), (0.125, 0.25)])
@pytest.mark.parametrize(
    ("exits", "layers", "branches"),
    [
        (ExitConfig(), 4, 0),
        (ExitConfig((2,), use_exit_mlp=True), 4, 1),
        (ExitConfig((2, 3), use_exit_mlp=True, use_exit_block=True), 6, 2),
    ],
)
def test_rates(rates: dict, exits: ExitConfig, layers: int, branches: int, hidden: float, attention: float) -> None:
    forward(exits, True, hidden, attention)
    assert rates["attention"] == [attention] * layers
    assert [rate for rate in rates["hidden"] if rate] == ([hidden] * (1 + 2 * layers + branches) if hidden else [])


def test_none_in_evaluation(rates: dict) -> None:
    forward(ExitConfig((2,), use_exit_block=True), False, 0.5, 0.25)
    assert rates["hidden"] == [] and set(rates["attention"]) == {0.0}
