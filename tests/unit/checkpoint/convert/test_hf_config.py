"""What a config.json may ask for."""

from typing import Any

import pytest

from megatron.checkpoint.convert import hf_config
from megatron.errors import CheckpointError

MIXED = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "window for some": (MIXED | {"max_window_layers": 2}, "layers differ in attention"),
    "kinds of layers": (
        MIXED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "layers differ in attention",
    ),
    "all biases": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true"),
    "groups unsaid": ({"num_key_value_heads": None}, "lacks num_key_value_heads"),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "rope_type 'default' is not supported"),
    "GPT-2's scaling": ({"model_type": "gpt2", "scale_attn_weights": False}, "attention without scaling"),
    "GPT-2's activation": ({"model_type": "gpt2", "activation_function": "relu"}, "'relu' is not supported"),
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "intermediate_size": 48, "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_features_that_are_refused(name: str) -> None:
    changes, message = CONFIGS[name]
    with pytest.raises(CheckpointError, match=f"^a file.*{message}"):
        hf_config.model_of(hf_config.Fields(QWEN | changes, "a file"))


def test_windows_that_are_read() -> None:
    """Qwen's window counts where it is used, in all layers; Mistral's where it isn't null."""

    def window(**changes: Any) -> int | None:
        return hf_config.model_of(hf_config.Fields(QWEN | changes, "a file")).window_size

    assert window(sliding_window=8, max_window_layers=0) is None
    assert window(sliding_window=8, max_window_layers=0, use_sliding_window=True) == 8
    assert window(sliding_window=8, max_window_layers=4, use_sliding_window=True) is None
    assert window(model_type="mistral", sliding_window=8) == 8
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="mistral") == 4096


def test_a_long_context_is_no_training_length() -> None:
    found = hf_config.model_of(hf_config.Fields(QWEN, "a file"))
    assert (found.max_position_embeddings, found.seq_length) == (32768, 4096)
