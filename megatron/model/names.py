"""Parallelism-free names of a model's state: what checkpoints and initial values are keyed by.

The running model stacks gate and up matrices and pads the vocabulary; both depend on the layout. `named_parts`
gives views of a tensor by the names that don't: separate gate and up, and true-vocabulary rows apart from padding.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron.model.gpt import GPT


def named_parts(name: str, tensor: Tensor, model: GPT, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Views of `tensor`, a parameter called `name` in `model` or anything of its shape, by checkpoint name."""
    module, kind = name.rsplit(".", 1)
    if model.config.gated and module.endswith((".mlp.up", ".branch.up")):
        gate, up = tensor.chunk(2, dim=0)
        yield f"{module.removesuffix('up')}gate.{kind}", gate
        yield name, up
    elif module == "embedding.word" or module.split(".")[-1] == "output":
        yield name, tensor[:vocab_size]
        if vocab_size < tensor.shape[0]:
            yield f"{name}.padding", tensor[vocab_size:]
    else:
        yield name, tensor


def model_state(model: GPT, vocab_size: int) -> dict[str, Tensor]:
    """Checkpoint name -> live view, for all parameters of the stage."""
    return {
        part: view
        for name, parameter in model.named_parameters()
        for part, view in named_parts(name, parameter.detach(), model, vocab_size)
    }
