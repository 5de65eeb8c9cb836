"""Causal self-attention on torch SDPA: multi-head, grouped-query and multi-query, with optional sliding window.

Masks are boolean, True = may look. `mask=None` means plain causal attention, which SDPA runs without a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.model import ModelConfig
from megatron.nn.kv import LayerKV
from megatron.nn.linear import ColumnParallelLinear, RowParallelLinear
from megatron.nn.norm import build_norm
from megatron.nn.rotary import Rope, apply_rotary
from megatron.parallel.tensor import ALONE, TensorParallel


def attention_mask(
    queries: int, keys: int, window: int | None, document_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """Mask [b or 1, 1, queries, keys] for queries that are the last positions of keys.

    None where none is needed: plain causal attention, or a single query that sees every key. document_ids [b, keys]
    restricts attention to equal ids; window to that many positions, the own included.
    """
    whole = window is None or keys <= window
    if queries in (1, keys) and whole and document_ids is None:
        return None
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    visible = visible[None, None]
    if document_ids is not None:
        same = document_ids[:, keys - queries :, None] == document_ids[:, None, :]
        visible = visible & same[:, None]
    return visible


class SelfAttention(nn.Module):
    """QKV projection, rotary, attention, output projection; each tp rank has its share of the heads."""

    def __init__(self, config: ModelConfig, recompute_core: bool = False, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.heads, self.kv_heads = tp.share(config.num_attention_heads), tp.share(config.num_kv_heads)
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.recompute_core = recompute_core
        width = config.hidden_size
        qkv_rows = (config.num_attention_heads + 2 * config.num_kv_heads) * self.head_dim
        self.qkv = ColumnParallelLinear(width, qkv_rows, config.qkv_bias, tp)
        self.proj = RowParallelLinear(config.num_attention_heads * self.head_dim, width, config.add_bias_linear, tp)
        partial = tp.size > 1  # each rank normalises its own heads
        self.q_norm = build_norm(config, self.head_dim, partial) if config.qk_layernorm else None
        self.k_norm = build_norm(config, self.head_dim, partial) if config.qk_layernorm else None

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: LayerKV | None = None) -> Tensor:
        """x [s, b, h] -> [s, b, h]; with a cache, x are the positions after those cached."""
        q, k, v = self._project(x, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.recompute_core and self.training and torch.is_grad_enabled():
            out = checkpoint(self._attend, q, k, v, mask, use_reentrant=False, preserve_rng_state=self.dropout > 0)
        else:
            out = self._attend(q, k, v, mask)
        return self.proj(out)

    def _project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [s, b, heads, d], keys and values [s, b, kv heads, d], normalised and rotated."""
        rows = self.qkv(x)  # of all positions, which x need not have
        s, b, _ = rows.shape
        per_group = self.heads // self.kv_heads
        # Megatron's rows: per group its query heads, its key, its value.
        grouped = rows.view(s, b, self.kv_heads, per_group + 2, self.head_dim)
        turning, v = grouped.split((per_group + 1, 1), dim=3)  # split's gradient is one concatenation
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turning.split((per_group, 1), dim=3)
            turning = torch.cat((self.q_norm(q), self.k_norm(k)), dim=3)
        if rope is not None:
            turning = apply_rotary(turning, rope)  # queries and keys in one pass
        q, k = turning.split((per_group, 1), dim=3)
        return q.reshape(s, b, self.heads, self.head_dim), k.squeeze(3), v.squeeze(3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[sq, b, heads, d] x [sk, b, kv heads, d] -> [sq, b, heads * d]."""
        out = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3),
            k.permute(1, 2, 0, 3),
            v.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.shape[0] > 1,  # a single query sees all keys
            enable_gqa=self.kv_heads != self.heads,
        )
        return out.permute(2, 0, 1, 3).flatten(2)
