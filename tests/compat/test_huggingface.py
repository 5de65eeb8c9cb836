"""The layer class against Hugging Face's models of each family, at tiny sizes with random weights."""

import pytest
import torch

from megatron.config.model import ModelConfig
from megatron.model.gpt import GPT
from megatron.testing.tiny import build_gpt

transformers = pytest.importorskip("transformers", reason="needs the hf extra")

SIZES = dict(num_layers=3, hidden_size=32, num_attention_heads=4, seq_length=24, attention_dropout=0, hidden_dropout=0)
LLAMA = SIZES | dict(
    normalization="RMSNorm", norm_epsilon=1e-6, position_embedding_type="rope", swiglu=True, ffn_hidden_size=48,
    add_bias_linear=False, untie_embeddings_and_output_weights=True, group_query_attention=True, num_query_groups=2,
)  # fmt: skip
HF_LLAMA = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def hf_model(name: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**config, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(settings)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3 if p.dim() > 1 else 0.1)
            p += 1.0 if p.dim() == 1 else 0.0
    return model.double().eval()


def grouped_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows per group: its query heads, its key, its value."""
    parts = [t.reshape(groups, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def from_llama(theirs: torch.nn.Module, config: ModelConfig) -> GPT:
    model = build_gpt(config, vocab_size=64, dtype=torch.float64)
    state, ours = theirs.state_dict(), {}
    ours["embedding.word.weight"] = state["model.embed_tokens.weight"]
    ours["final_norm.weight"] = state["model.norm.weight"]
    ours["output.weight"] = state["lm_head.weight"]
    for i in range(config.num_layers):
        their, our = f"model.layers.{i}.", f"layers.{i}."
        ours[our + "input_norm.weight"] = state[their + "input_layernorm.weight"]
        ours[our + "mlp_norm.weight"] = state[their + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            qkv = [state.get(f"{their}self_attn.{name}_proj.{kind}") for name in "qkv"]
            if qkv[0] is not None:
                ours[f"{our}attention.qkv.{kind}"] = grouped_qkv(*qkv, config.num_kv_heads)
        ours[our + "attention.proj.weight"] = state[their + "self_attn.o_proj.weight"]
        for name in ("q_norm", "k_norm"):
            if f"{their}self_attn.{name}.weight" in state:
                ours[f"{our}attention.{name}.weight"] = state[f"{their}self_attn.{name}.weight"]
        gate, up = state[their + "mlp.gate_proj.weight"], state[their + "mlp.up_proj.weight"]
        ours[our + "mlp.up.weight"] = torch.cat((gate, up))
        ours[our + "mlp.down.weight"] = state[their + "mlp.down_proj.weight"]
    model.load_state_dict(ours)
    return model.eval()


def from_gpt2(theirs: torch.nn.Module, config: ModelConfig) -> GPT:
    model = build_gpt(config, vocab_size=64, dtype=torch.float64)
    state, ours = theirs.state_dict(), {}
    ours["embedding.word.weight"] = state["transformer.wte.weight"]
    ours["embedding.position.weight"] = state["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = state[f"transformer.ln_f.{kind}"]
        for i in range(config.num_layers):
            their, our = f"transformer.h.{i}.", f"layers.{i}."
            ours[f"{our}input_norm.{kind}"] = state[f"{their}ln_1.{kind}"]
            ours[f"{our}mlp_norm.{kind}"] = state[f"{their}ln_2.{kind}"]
            q, k, v = state[f"{their}attn.c_attn.{kind}"].t().chunk(3, dim=0)
            ours[f"{our}attention.qkv.{kind}"] = grouped_qkv(q, k, v, config.num_attention_heads)
            for mine, yours in (("attention.proj", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                ours[f"{our}{mine}.{kind}"] = state[f"{their}{yours}.{kind}"].t()
    model.load_state_dict(ours)
    return model.eval()


CASES = {
    "llama": ("Llama", {}, {}),
    "llama3_rope": (
        "Llama",
        {"rope_scaling": LLAMA3_ROPE},
        {"use_rope_scaling": True, "rope_scaling_factor": 4.0, "rope_original_max_position_embeddings": 16},
    ),
    "linear_rope": (
        "Llama",
        {"rope_scaling": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rotary_seq_len_interpolation_factor": 2.0},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 7}, {"window_size": 7}),
    "qwen2_qkv_bias": ("Qwen2", {}, {"add_qkv_bias": True}),
    "qwen3_qk_norm": ("Qwen3", {"head_dim": 8}, {"qk_layernorm": True}),
}


@torch.no_grad()
def assert_same_logits(theirs: torch.nn.Module, ours: GPT) -> None:
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    hidden = ours.embedding(tokens, None, None)
    context = ours.context(24, hidden)
    _, taps = ours(hidden, context, ours.stages[0])
    logits = ours.features("final", taps["final"], context) @ ours.output_weight("final").t()
    # Both compute in float64, but the reference keeps its rotary tables in fp32.
    torch.testing.assert_close(logits.transpose(0, 1), theirs(tokens).logits.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_llama_families(name: str) -> None:
    family, their_changes, our_changes = CASES[name]
    config = ModelConfig(**(LLAMA | our_changes))
    theirs = hf_model(family, **(HF_LLAMA | their_changes))
    assert_same_logits(theirs, from_llama(theirs, config))


def test_gpt2() -> None:
    config = ModelConfig(**SIZES, max_position_embeddings=32)
    theirs = hf_model("GPT2", vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    assert_same_logits(theirs, from_gpt2(theirs, config))
