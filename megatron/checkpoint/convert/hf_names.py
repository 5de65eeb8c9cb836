"""Our tensors and Hugging Face's, by name: one of ours is one of theirs or (query, key, value) three.

Pure functions on names and tensors; with tensors on the meta device they say names and shapes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model import ModelConfig

_LLAMA_LAYER = {
    "input_norm": "input_layernorm",
    "attention.qkv": "self_attn.{}_proj",
    "attention.proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_LLAMA_TOP = {"embedding.word": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}
_GPT2_LAYER = {
    "input_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_GPT2_TOP = {
    "embedding.word": "transformer.wte",
    "embedding.position": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "output": "lm_head",
}
_PLACE = re.compile(r"(layers|exits)\.(\d+)\.(.+)")
# Buffers that old files hold, which are computed from the config.
COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
EXITS = "exits."


@dataclass(frozen=True)
class Names:
    """The names of one architecture. `transposed`: linear weights lie as [in, out], and query, key and value in one."""

    layer: Mapping[str, str]
    top: Mapping[str, str]
    base: str  # what stands before all names but those of the output
    layers: str
    transposed: bool
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model_type: str, model: ModelConfig) -> "Names":
        """Those of an architecture that hf_config.py knows, for a model's sizes."""
        if model_type == "gpt2":
            return cls(_GPT2_LAYER, _GPT2_TOP, "transformer.", "h", True, model.num_kv_heads, model.head_dim)
        return cls(_LLAMA_LAYER, _LLAMA_TOP, "model.", "layers", False, model.num_kv_heads, model.head_dim)

    def theirs(self, name: str) -> list[str]:
        """Their names of what one of our tensors becomes, in the order of `split` and `join`."""
        module, kind = name.rsplit(".", 1)
        theirs, _ = self._module(module)
        if module.endswith("attention.qkv") and not self.transposed:
            return [f"{theirs.format(letter)}.{kind}" for letter in "qkv"]
        return [f"{theirs}.{kind}"]

    def split(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Their tensors that one of ours becomes; views where that is possible."""
        module, _ = name.rsplit(".", 1)
        _, linear = self._module(module)
        parts = self._ungroup(tensor) if module.endswith("attention.qkv") else [tensor]
        if self.transposed and len(parts) > 1:
            parts = [torch.cat(parts)]
        return [self._turn(part) for part in parts] if linear else parts

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """One of our tensors from theirs."""
        module, _ = name.rsplit(".", 1)
        _, linear = self._module(module)
        if linear:
            parts = [self._turn(part) for part in parts]
        if not module.endswith("attention.qkv"):
            return parts[0]
        return self._group(parts[0].chunk(3) if self.transposed else parts)

    def _module(self, module: str) -> tuple[str, bool]:
        """Their name of a module, and whether it is a linear layer inside a transformer layer."""
        if module in self.top:
            return self.top[module], False
        place, number, inner = _PLACE.fullmatch(module).groups()
        if place == "layers":
            return f"{self.base}{self.layers}.{number}.{self.layer[inner]}", _is_linear(inner)
        prefix = f"{EXITS}{number}."
        if inner in ("norm", "output"):
            return prefix + inner, False
        part, inner = inner.split(".", 1)
        if part == "branch":
            return f"{prefix}branch.{self.layer[f'mlp.{inner}'].removeprefix('mlp.')}", True
        return f"{prefix}block.{self.layer[inner]}", _is_linear(inner)

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed and tensor.dim() == 2 else tensor

    def _ungroup(self, tensor: Tensor) -> list[Tensor]:
        """Query, key and value rows apart; ours lie by group: its query heads, its key, its value."""
        grouped = tensor.reshape(self.kv_heads, -1, self.head_dim, *tensor.shape[1:])
        parts = grouped.split((grouped.shape[1] - 2, 1, 1), dim=1)
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]

    def _group(self, parts: Sequence[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        return torch.cat([part.reshape(self.kv_heads, -1, *rest) for part in parts], dim=1).flatten(0, 1)


def _is_linear(inner: str) -> bool:
    return inner.startswith("mlp.") or inner in ("attention.qkv", "attention.proj")
