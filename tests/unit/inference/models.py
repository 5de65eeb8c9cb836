"""Toy models of every kind that decoding must handle, in float64, and a slow reference that caches nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model import ExitConfig
from megatron.exits.spec import FINAL
from megatron.inference.engine import Engine
from megatron.model.gpt import GPT
from megatron.testing.tiny import build_gpt, model_config
from megatron.tokenizer.null import NullTokenizer

VOCAB, PADDED, POSITIONS = 60, 64, 40
EOD = VOCAB - 1

_SHAPE = dict(seq_length=POSITIONS, init_method_std=0.3)
_OWN = dict(exit_layer_nums=(1, 3), exit_norm="own")
VARIANTS = {
    "gpt": (model_config("gpt", **_SHAPE), ExitConfig(exit_layer_nums=(1, 3))),
    "gpt_untied": (
        model_config("gpt", untie_embeddings_and_output_weights=True, **_SHAPE),
        ExitConfig(**_OWN, untie_exit_output_weights=True),
    ),
    "llama": (model_config("llama", **_SHAPE), ExitConfig(**_OWN, untie_exit_output_weights=True)),
    "final_norm": (model_config("llama", **_SHAPE), ExitConfig(exit_layer_nums=(2,), exit_norm="final")),
    "pre_exit": (model_config("gpt", **_SHAPE), ExitConfig(exit_layer_nums=(1, 2, 4), pre_exit=True)),
    "exit_mlp": (model_config("llama", **_SHAPE), ExitConfig(**_OWN, use_exit_mlp=True)),
    "exit_block": (model_config("llama", **_SHAPE), ExitConfig(**_OWN, use_exit_block=True)),
    "exit_mlp_and_block": (
        model_config("gpt", **_SHAPE),
        ExitConfig(exit_layer_nums=(2, 3), use_exit_mlp=True, use_exit_block=True),
    ),
    "pre_exit_block": (
        model_config("llama", **_SHAPE),
        ExitConfig(exit_layer_nums=(1, 3), pre_exit=True, use_exit_block=True, exit_norm="final"),
    ),
    "window": (model_config("llama", window_size=5, **_SHAPE), ExitConfig(**_OWN, use_exit_block=True)),
    "last_layer": (model_config("gpt", **_SHAPE), ExitConfig(exit_layer_nums=(2, 4), exit_norm="own")),
    "norm_options": (
        model_config(
            "gpt", apply_layernorm_1p=True, apply_residual_connection_post_layernorm=True, qk_layernorm=True, **_SHAPE
        ),
        ExitConfig(**_OWN, use_exit_mlp=True),
    ),
    "no_positions": (
        model_config("gpt", position_embedding_type="none", squared_relu=True, **_SHAPE),
        ExitConfig(exit_layer_nums=(3, 1)),
    ),
    "no_exits": (model_config("llama", **_SHAPE), ExitConfig()),
}


def make(variant: str, seed: int = 1) -> GPT:
    """A model of the variant whose padding rows, were they looked at, would win everywhere."""
    config, exits = VARIANTS[variant]
    model = build_gpt(config, exits, VOCAB, PADDED, torch.float64, seed).eval()
    with torch.no_grad():
        for head in model.head_labels():
            model.output_weight(head)[VOCAB:] = 100.0
    return model


def engine_of(model: GPT) -> Engine:
    return Engine(model, NullTokenizer(VOCAB - 1))


@dataclass(frozen=True)
class Reference:
    """One token of the slow reference; `logits` are those of the head that emitted it."""

    id: int
    exit: str
    confidence: float
    logits: Tensor


@torch.no_grad()
def all_logits(model: GPT, ids: list[int]) -> dict[str, Tensor]:
    """Logits [len(ids), vocabulary] of every head by the forward pass of training."""
    hidden = model.embedding(torch.tensor([ids]), None, None)
    context = model.context(len(ids), hidden)
    _, taps = model(hidden, context, model.stages[0])
    return {
        head: model.features(head, taps[head], context)[:, 0] @ model.output_weight(head)[:VOCAB].t()
        for head in model.head_labels()
    }


def slow_greedy(
    model: GPT, prompt: list[int], count: int, threshold: float = 2.0, exit_layers: tuple[int, ...] = ()
) -> list[Reference]:
    """EE-LLM's meaning of early exit with everything computed anew for every token."""
    ids, out = list(prompt), []
    while len(out) < count and (not out or out[-1].id != EOD):
        logits = {head: values[-1] for head, values in all_logits(model, ids).items()}
        for head in model.head_labels():
            confidence, top = logits[head].softmax(-1).max(-1)
            chosen = threshold < 1 and (not exit_layers or (head != FINAL and int(head) in exit_layers))
            if head == FINAL or (chosen and confidence >= threshold):
                break
        out.append(Reference(int(top), head, float(confidence), logits[head]))
        ids.append(int(top))
    return out


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, EOD, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
