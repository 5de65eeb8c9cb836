"""How many parameters a rank holds, counted from the config as `model.gpt` builds them. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.model import ExitConfig, ModelConfig
from megatron.model.partition import StageSpec


@dataclass(frozen=True)
class Parameters:
    """Of one rank, by part. copies: of what another stage owns."""

    embedding: int
    layers: int
    exits: int
    output: int
    copies: int

    @property
    def total(self) -> int:
        """All that the rank holds."""
        return self.embedding + self.layers + self.exits + self.output + self.copies

    def trained(self, tuning: bool) -> int:
        """Those that learn: all, or where exits are tuned theirs."""
        return self.exits if tuning else self.total


def rank_parameters(
    model: ModelConfig, exits: ExitConfig, stages: Sequence[StageSpec], padded_vocab_size: int, tp: int = 1
) -> Parameters:
    """What the rank of these stages holds, one of `tp` that share them."""
    first, last = any(stage.is_first for stage in stages), any(stage.is_last for stage in stages)
    count, untied = sum(len(stage.exits) for stage in stages), model.untie_embeddings_and_output_weights
    tied_exits, tied_head = bool(count) and not exits.untie_exit_output_weights, last and not untied
    shares_norm = bool(count) and exits.exit_norm == "final" and not last
    vocabulary, norm = padded_vocab_size // tp * model.hidden_size, norm_parameters(model)
    learned = model.position_embedding_type == "learned_absolute"
    positions = model.max_positions * model.hidden_size if learned else 0
    layers = sum(stage.last - stage.first for stage in stages)
    return Parameters(
        embedding=(vocabulary + positions) * first,
        layers=layers * layer_parameters(model, tp),
        exits=count * exit_parameters(model, exits, padded_vocab_size, tp),
        output=norm * last + vocabulary * (last and untied),
        copies=vocabulary * ((tied_exits or tied_head) and not first) + norm * shares_norm,
    )


def layer_parameters(model: ModelConfig, tp: int = 1) -> int:
    """One layer's share of a rank."""
    h, d, heads, kv = model.hidden_size, model.head_dim, model.num_attention_heads, model.num_kv_heads
    rows = (heads + 2 * kv) * d
    qkv = rows * h // tp + (rows // tp if model.qkv_bias else 0)
    projection = heads * d * h // tp + (h if model.add_bias_linear else 0)
    between = 2 * norm_parameters(model, d) if model.qk_layernorm else 0
    return 2 * norm_parameters(model) + qkv + between + projection + mlp_parameters(model, tp)


def mlp_parameters(model: ModelConfig, tp: int = 1) -> int:
    """One MLP's."""
    h, rows = model.hidden_size, model.ffn_size * (2 if model.gated else 1)
    biases = rows // tp + h if model.add_bias_linear else 0
    return (rows * h + h * model.ffn_size) // tp + biases


def norm_parameters(model: ModelConfig, width: int | None = None) -> int:
    """One norm's; by default over a hidden state."""
    return (width or model.hidden_size) * (2 if model.normalization == "LayerNorm" else 1)


def exit_parameters(model: ModelConfig, exits: ExitConfig, padded_vocab_size: int, tp: int = 1) -> int:
    """One exit's own."""
    return (
        (mlp_parameters(model, tp) if exits.use_exit_mlp else 0)
        + (layer_parameters(model, tp) if exits.use_exit_block else 0)
        + (norm_parameters(model) if exits.exit_norm == "own" else 0)
        + (padded_vocab_size // tp * model.hidden_size if exits.untie_exit_output_weights else 0)
    )


def model_parameters(model: ModelConfig, exits: ExitConfig, stages: Sequence[StageSpec], padded_vocab_size: int) -> int:
    """All of the model's, each counted once."""
    whole = StageSpec(
        0, stages[0].first, stages[-1].last, tuple(e for s in stages for e in s.exits), True, stages[-1].is_last
    )
    return rank_parameters(model, exits, (whole,), padded_vocab_size).total
