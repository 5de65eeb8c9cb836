"""Losses and gradients of the package against `independent.py`, which shares no code with it, in float64."""

import pytest
import torch

from megatron.config.model import ExitConfig, ModelConfig
from megatron.exits.loss import Objective
from megatron.exits.spec import exit_specs
from megatron.model.stage import Stage
from megatron.testing.tiny import accumulate, build_gpt, evaluate_heads, random_batch
from tests.unit.model.independent import losses_and_gradients, scores

VOCAB, PADDED = 60, 64
BASE = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "init_method_std": 0.1,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
CASES = {
    "gpt": ({}, {"use_exit_mlp": True}),
    "gpt-pre-block": ({"openai_gelu": True, "add_bias_linear": False},
                      {"pre_exit": True, "use_exit_block": True, "exit_norm": "own"}),
    "gpt-erf-1p-post": ({"apply_layernorm_1p": True, "apply_residual_connection_post_layernorm": True,
                         "bias_gelu_fusion": False},
                        {"use_exit_mlp": True, "use_exit_block": True, "exit_norm": "final"}),
    "no-positions": ({"position_embedding_type": "none", "squared_relu": True}, {"exit_norm": "own"}),
    "rms-1p-qk": ({"apply_layernorm_1p": True, "normalization": "RMSNorm", "qk_layernorm": True},
                  {"exit_norm": "own"}),
    "mqa-swiglu": ({"position_embedding_type": "rope", "rotary_percent": 0.5, "kv_channels": 12,
                    "group_query_attention": True, "num_query_groups": 1, "swiglu": True, "ffn_hidden_size": 40},
                   {"untie_exit_output_weights": True, "use_exit_block": True}),
    "window-geglu-untied": ({"position_embedding_type": "rope", "rotary_seq_len_interpolation_factor": 2.0,
                             "geglu": True, "ffn_hidden_size": 40, "untie_embeddings_and_output_weights": True,
                             "window_size": 5, "add_bias_linear": False, "add_qkv_bias": True},
                            {"pre_exit": True, "exit_norm": "final"}),
    "gqa-llama3": ({"position_embedding_type": "rope", "use_rope_scaling": True, "normalization": "RMSNorm",
                    "rope_original_max_position_embeddings": 64, "group_query_attention": True,
                    "num_query_groups": 2}, {"use_exit_mlp": True, "exit_norm": "own"}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("documents_apart", "dynamic", "per_token"), [(False, True, False), (True, False, True), (True, True, False)]
)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case: str, documents_apart: bool, dynamic: bool, per_token: bool) -> None:
    model_flags, exit_flags = CASES[case]
    config = ModelConfig(**(BASE | model_flags))
    exits = ExitConfig(
        exit_layer_nums=(1, 3, 4), exit_layer_weight=(0.3, 0.7, 0.2), exit_layer_temperature=(2.0, 0.5, 1.0),
        use_dynamic_exit_layer_weight=dynamic, **exit_flags,
    )  # fmt: skip
    model = build_gpt(config, exits, VOCAB, PADDED, torch.float64)
    apart = {name: documents_apart for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")}
    batches = [random_batch(2, 16, VOCAB, seed=seed, **apart) for seed in (0, 1)]
    expected, gradients = losses_and_gradients(
        dict(model.named_parameters()), batches, config, exits, per_token=per_token
    )
    for losses, record in zip(train(model, exits, batches, dynamic, per_token), expected, strict=True):
        for head, loss in record.items():
            torch.testing.assert_close(losses[head], loss, rtol=1e-12, atol=1e-14)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).main_grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_evaluation(case: str) -> None:
    """Plain cross-entropy, whatever temperature and weighting say of training; padding rows are no predictions."""
    model_flags, exit_flags = CASES[case]
    config = ModelConfig(**(BASE | model_flags))
    exits = ExitConfig(
        exit_layer_nums=(1, 3), exit_layer_temperature=(2.0, 0.5), use_dynamic_exit_layer_weight=True, **exit_flags
    )
    model = build_gpt(config, exits, VOCAB, PADDED, torch.float64)
    with torch.no_grad():  # padding rows that would win
        model.output_weight("final")[VOCAB:] *= 30
    batch = random_batch(4, 16, VOCAB, eod_mask_loss=True)
    ours = evaluate_heads(model, batch, VOCAB)
    expected = scores({name: p.detach() for name, p in model.named_parameters()}, batch, config, exits, VOCAB)
    assert ours.keys() == expected.keys()
    for head, (loss, correct, agree) in expected.items():
        torch.testing.assert_close(ours[head].loss, loss, rtol=1e-12, atol=0)
        assert (ours[head].correct, ours[head].agree) == (correct, agree)
    assert 0 < expected["1"][2] < expected["final"][2]


def train(model, exits: ExitConfig, batches, dynamic: bool, per_token: bool) -> list[dict[str, torch.Tensor]]:
    """One step's forward and backward passes by the package; the losses of each microbatch."""
    specs = exit_specs(exits)
    objective = Objective(
        weights={spec.label: spec.weight for spec in specs} | {"final": 1.0},
        temperatures={spec.label: spec.temperature for spec in specs},
        dynamic=frozenset(spec.label for spec in specs) if dynamic else frozenset(),
        mean_tokens=sum(batch.loss_mask.sum() for batch in batches) / len(batches) if per_token else None,
    )
    model.train()
    return [
        {label: loss / len(batches) for label, loss in terms.loss.items()}
        for terms in accumulate(Stage(model), batches, objective)
    ]
