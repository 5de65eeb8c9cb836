"""Work per token in floating-point operations, with and without exits: for model FLOP/s and predictions. No torch.

Counts matrix products (2 per multiply-add), attention over the causal half; norms and activations are left out.
Backward counts twice the forward; recomputation does not count as model work.
"""

from megatron.config.model import ExitConfig, ModelConfig


def layer_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs per token of one transformer layer."""
    h, heads, d = model.hidden_size, model.num_attention_heads, model.head_dim
    projections = 2 * h * (heads + 2 * model.num_kv_heads) * d + 2 * heads * d * h
    return projections + attention_flops(model, seq_length) + mlp_flops(model)


def attention_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs per token of attention's core: scores and the sum over values."""
    span = seq_length if model.window_size is None else min(seq_length, 2 * model.window_size)
    return 2 * 2 * model.num_attention_heads * model.head_dim * span / 2


def mlp_flops(model: ModelConfig) -> float:
    """Forward FLOPs per token of one MLP."""
    return 2 * model.hidden_size * model.ffn_size * (3 if model.gated else 2)


def head_flops(model: ModelConfig, padded_vocab_size: int) -> float:
    """Forward FLOPs per token of an output matrix."""
    return 2 * model.hidden_size * padded_vocab_size


def exit_flops(model: ModelConfig, exits: ExitConfig, seq_length: int, padded_vocab_size: int) -> float:
    """Forward FLOPs per token of one early exit: its branch, block and output matrix."""
    branch = mlp_flops(model) if exits.use_exit_mlp else 0
    block = layer_flops(model, seq_length) if exits.use_exit_block else 0
    return branch + block + head_flops(model, padded_vocab_size)


def training_flops_per_token(model: ModelConfig, exits: ExitConfig, padded_vocab_size: int) -> float:
    """Forward and backward FLOPs per token of a training step with all exits."""
    backbone = model.num_layers * layer_flops(model, model.seq_length) + head_flops(model, padded_vocab_size)
    heads = len(exits.exit_layer_nums) * exit_flops(model, exits, model.seq_length, padded_vocab_size)
    return 3 * (backbone + heads)
