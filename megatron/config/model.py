"""What the model is: backbone and early exits. Frozen values, no torch.

Derived sizes are properties, never written back: a config always shows what the user asked for.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.config.setting import setting


@dataclass(frozen=True)
class ModelConfig:
    """The backbone. GPT and Llama families in one layer class."""

    num_layers: int | None = setting(None, "Number of transformer layers.", aliases=("--encoder-num-layers",))
    hidden_size: int | None = setting(None, "Width of the residual stream.")
    num_attention_heads: int | None = setting(None, "Number of query heads.")
    seq_length: int | None = setting(None, "Tokens per training sequence.", aliases=("--encoder-seq-length",))
    max_position_embeddings: int | None = setting(
        None,
        "Longest sequence the model accepts (size of the learned position table). Default: --seq-length.",
    )
    ffn_hidden_size: int | None = setting(
        None, "Width of the MLP. Default: 4 x hidden; with --swiglu/--geglu 2/3 of it, rounded down to 64."
    )
    kv_channels: int | None = setting(None, "Channels per attention head. Default: hidden / heads.")
    group_query_attention: bool = setting(False, "Share keys and values among groups of query heads.")
    num_query_groups: int = setting(1, "Key/value heads with --group-query-attention (1 = multi-query).")
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = setting(
        "learned_absolute",
        "How positions enter the model.",
        shorthands={"--use-rotary-position-embeddings": "rope", "--no-position-embedding": "none"},
    )
    rotary_base: float = setting(10000.0, "Base of the rotary frequencies.")
    rotary_percent: float = setting(1.0, "Share of each head's channels that is rotated, in (0, 1].")
    rotary_seq_len_interpolation_factor: float | None = setting(
        None, "Linear rotary scaling: positions are divided by this factor."
    )
    use_rope_scaling: bool = setting(False, "Llama-3 rotary scaling (low frequencies stretched).")
    rope_scaling_factor: float = setting(8.0, "Stretch of the low frequencies with --use-rope-scaling.")
    rope_low_freq_factor: float = setting(1.0, "Llama-3 scaling: low frequency factor.")
    rope_high_freq_factor: float = setting(4.0, "Llama-3 scaling: high frequency factor.")
    rope_original_max_position_embeddings: int = setting(8192, "Llama-3 scaling: context length before the stretch.")
    make_vocab_size_divisible_by: int = setting(
        128, "The vocabulary is padded to a multiple of this times the tensor-parallel size."
    )
    padded_vocab_size: int | None = setting(None, "Padded vocabulary size, overriding the rule above.")
    normalization: Literal["LayerNorm", "RMSNorm"] = setting("LayerNorm", "Kind of norm.")
    norm_epsilon: float = setting(1e-5, "Epsilon of all norms.", aliases=("--layernorm-epsilon",))
    apply_layernorm_1p: bool = setting(False, "Norm weights are stored as (weight - 1), started at zero.")
    apply_residual_connection_post_layernorm: bool = setting(
        False, "Residuals are taken after the norms instead of before."
    )
    openai_gelu: bool = setting(False, "Tanh-approximated GELU, whatever the fusion flags say.")
    squared_relu: bool = setting(False, "Squared ReLU instead of GELU.")
    swiglu: bool = setting(False, "Gated MLP with SiLU.")
    geglu: bool = setting(False, "Gated MLP with tanh-approximated GELU.")
    bias_gelu_fusion: bool = setting(
        True,
        "GELU in Megatron's fused form, which is the tanh approximation; otherwise, and without linear biases, "
        "the exact erf form.",
        off="--no-bias-gelu-fusion",
    )
    add_bias_linear: bool = setting(True, "Biases in linear layers.", off="--disable-bias-linear")
    add_qkv_bias: bool = setting(False, "A bias in the QKV projection even with --disable-bias-linear.")
    qk_layernorm: bool = setting(False, "Normalise each head's queries and keys.")
    window_size: int | None = setting(None, "Sliding-window attention: each token sees this many, itself included.")
    untie_embeddings_and_output_weights: bool = setting(
        False, "The final head gets its own matrix instead of the word embedding."
    )
    attention_dropout: float = setting(0.1, "Dropout on attention probabilities.")
    hidden_dropout: float = setting(0.1, "Dropout on the embedding and on each residual branch.")
    init_method_std: float = setting(0.02, "Standard deviation of initial weights.")
    init_method_xavier_uniform: bool = setting(False, "Xavier-uniform initial weights.")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        if self.kv_channels:
            return self.kv_channels
        assert self.hidden_size and self.num_attention_heads  # the rules ask for them
        return self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: one per query head unless grouped."""
        heads = self.num_query_groups if self.group_query_attention else self.num_attention_heads
        assert heads
        return heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.swiglu or self.geglu

    @property
    def ffn_size(self) -> int:
        """Width of the MLP (of gate and of up, each, where gated)."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        assert self.hidden_size
        return 8 * self.hidden_size // 3 // 64 * 64 if self.gated else 4 * self.hidden_size

    @property
    def activation(self) -> str:
        """One of `silu`, `gelu`, `gelu_tanh`, `relu2`: what the MLP applies (to the gate where gated)."""
        if self.swiglu:
            return "silu"
        if self.squared_relu:
            return "relu2"
        tanh = self.geglu or self.openai_gelu or (self.bias_gelu_fusion and self.add_bias_linear)
        return "gelu_tanh" if tanh else "gelu"

    @property
    def qkv_bias(self) -> bool:
        """Whether the QKV projection has a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def max_positions(self) -> int:
        """Longest sequence the model accepts."""
        positions = self.max_position_embeddings or self.seq_length
        assert positions
        return positions


@dataclass(frozen=True)
class ExitConfig:
    """Where the early exits are, what their heads are made of, how their losses count."""

    exit_layer_nums: tuple[int, ...] = setting(
        (), "Layers that carry an exit, counted from 1. The lists below follow its order."
    )
    pre_exit: bool = setting(False, "Exits branch off the layer's input instead of its output.")
    untie_exit_output_weights: bool = setting(False, "Each exit owns its output matrix.")
    exit_norm: Literal["none", "own", "final"] = setting(
        "none",
        "Norm before an exit's output matrix: none, its own, or the model's shared final norm.",
        shorthands={"--use-exit-norm": "own"},
    )
    use_exit_mlp: bool = setting(False, "A second MLP beside the layer's own feeds the exit. Not with --pre-exit.")
    use_exit_block: bool = setting(False, "A whole transformer layer before the exit's norm and output matrix.")
    exit_layer_weight: tuple[float, ...] = setting((), "Loss weight of each exit. Default: 1.0.")
    exit_layer_weight_init: tuple[float, ...] = setting((), "Weights at iteration 0 of the warm-up. Default: 0.0.")
    exit_layer_weight_warmup_iters: int = setting(
        0, "Iterations over which exit weights move from their initial to their target values (0: constant)."
    )
    exit_layer_weight_warmup_style: Literal["linear", "cosine"] = setting(
        "linear", "Shape of the warm-up (or, where the initial weight is larger, the cool-down)."
    )
    exit_layer_temperature: tuple[float, ...] = setting(
        (), "Divides each exit's logits before the loss, in training only. Default: 1.0."
    )
    use_dynamic_exit_layer_weight: bool = setting(
        False, "Weigh each token's exit loss by the exit's own (detached) top probability for it."
    )
