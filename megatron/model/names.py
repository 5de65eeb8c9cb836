"""Parallelism-free names of a model's state: what checkpoints and initial values are keyed by.

The running model stacks gate and up matrices, pads the vocabulary, cuts tensors over tp ranks and copies some to
several stages; all of that depends on the layout. `named_parts` gives views of a tensor by the names that don't:
separate gate and up, and true-vocabulary rows apart from padding, each with its place in the whole tensor.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron.model.gpt import GPT
from megatron.parallel.placement import Placed
from megatron.parallel.tensor import splits


def named_parts(name: str, tensor: Tensor, model: GPT, vocab_size: int) -> Iterator[tuple[str, Placed]]:
    """Parts of `tensor`, a parameter called `name` in `model` or anything of its shape, by checkpoint name."""
    module, kind = name.rsplit(".", 1)
    dim = splits(model)[name].dim
    if model.config.gated and module.endswith((".mlp.up", ".branch.up")):
        gate, up = tensor.chunk(2, dim=0)
        yield f"{module.removesuffix('up')}gate.{kind}", _place(gate, dim, model)
        yield name, _place(up, dim, model)
    elif module in ("embedding.word", "word_copy") or module.split(".")[-1] == "output":
        yield from _rows(name.replace("word_copy", "embedding.word"), tensor, model, vocab_size)
    else:
        yield name, _place(tensor, dim, model)


def model_state(model: GPT, vocab_size: int) -> dict[str, Placed]:
    """Checkpoint name -> live view and its place, for all parameters of the rank."""
    return {
        part: placed
        for name, parameter in model.named_parameters()
        for part, placed in named_parts(name, parameter.detach(), model, vocab_size)
    }


def _place(view: Tensor, dim: int | None, model: GPT) -> Placed:
    shape, offset = list(view.shape), [0] * view.dim()
    if dim is not None:
        offset[dim] = shape[dim] * model.tp.rank
        shape[dim] *= model.tp.size
    return Placed(view, tuple(shape), tuple(offset))


def _rows(name: str, tensor: Tensor, model: GPT, vocab_size: int) -> Iterator[tuple[str, Placed]]:
    """A vocabulary matrix: the rows of true ids, and those that only pad it, where this rank has any."""
    rows, width = tensor.shape
    start, padded = rows * model.tp.rank, rows * model.tp.size
    true = min(max(vocab_size - start, 0), rows)
    yield name, Placed(tensor[:true], (vocab_size, width), (min(start, vocab_size), 0))
    if padded > vocab_size:
        yield f"{name}.padding", Placed(tensor[true:], (padded - vocab_size, width), (max(start - vocab_size, 0), 0))
