"""Initial values, drawn per named tensor from (seed, name): the same model for every layout and device.

Distributions (spec of EE-LLM §2.4): matrices N(0, std), those that write into the residual stream
N(0, std / sqrt(2 layers)), biases 0, norm weights 1 (0 where stored as weight - 1).
"""

import math

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.parallel.rng import generator

_RESIDUAL_WRITERS = (".proj.weight", ".down.weight")


@torch.no_grad()
def initialise(model: GPT, seed: int, vocab_size: int) -> None:
    """Fill every parameter of `model` in place."""
    for name, part in model_state(model, vocab_size).items():
        part.view.copy_(part.of(initial_value(name, part.shape, model.config, seed)))


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The first value of a whole tensor by its name in a checkpoint, in fp32 on the CPU."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.full(shape, 0.0 if config.apply_layernorm_1p else 1.0)
    std = config.init_method_std
    if name.endswith(_RESIDUAL_WRITERS):
        std /= math.sqrt(2 * config.num_layers)
    return _draw(shape, std, config.init_method_xavier_uniform, generator(seed, "init", name))


def _draw(shape: tuple[int, ...], std: float, xavier: bool, stream: torch.Generator) -> Tensor:
    """A whole matrix, drawn in fp32 on the CPU."""
    values = torch.empty(shape)
    if xavier:
        return torch.nn.init.xavier_uniform_(values, generator=stream)
    return values.normal_(0.0, std, generator=stream)
