"""Parallelism-free names of a model's state: what checkpoints and initial values are keyed by.

The running model stacks gate and up matrices, pads the vocabulary, cuts tensors over tp ranks and copies some to
several stages; all of that depends on the layout. `named_parts` gives views of a tensor by the names that don't:
separate gate and up, and true-vocabulary rows apart from padding, each with its place in the whole tensor.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron.model.gpt import GPT
from megatron.parallel.placement import Placed


def named_parts(name: str, tensor: Tensor, model: GPT, vocab_size: int, first: int = 0) -> Iterator[tuple[str, Placed]]:
    """Parts of `tensor` by checkpoint name.

    tensor: a parameter called `name` in `model` or anything of its shape; or, from row `first` on, some rows of that.
    """
    dim = model.splits[name].dim
    for part, low, high, start, whole in _spans(name, model, vocab_size):
        a, b = max(low, first), min(high, first + len(tensor))
        if a >= b:
            continue
        view = tensor[a - first : b - first]
        shape, offset = [whole, *view.shape[1:]], [start + a - low, *[0] * (view.dim() - 1)]
        if dim is not None and dim > 0:
            offset[dim] = shape[dim] * model.tp.rank
            shape[dim] *= model.tp.size
        yield part, Placed(view, tuple(shape), tuple(offset))


def model_state(model: GPT, vocab_size: int) -> dict[str, Placed]:
    """Checkpoint name -> live view and its place, for all parameters of the rank."""
    return {
        part: placed
        for name, parameter in model.named_parameters()
        for part, placed in named_parts(name, parameter.detach(), model, vocab_size)
    }


def _spans(name: str, model: GPT, vocab_size: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Which rows [low, high) of a rank's parameter are rows from `start` on of a named tensor of `whole` rows."""
    module, kind = name.rsplit(".", 1)
    rows, tp = model.get_parameter(name).shape[0], model.tp
    ranks, rank = (tp.size, tp.rank) if model.splits[name].dim == 0 else (1, 0)
    if model.config.gated and module.endswith((".mlp.up", ".branch.up")):
        half = rows // 2
        yield f"{module.removesuffix('up')}gate.{kind}", 0, half, half * rank, half * ranks
        yield name, half, rows, half * rank, half * ranks
    elif module in ("embedding.word", "word_copy") or module.split(".")[-1] == "output":
        name, begin, padded = name.replace("word_copy", "embedding.word"), rows * rank, rows * ranks
        true = min(max(vocab_size - begin, 0), rows)
        yield name, 0, true, begin, vocab_size
        yield f"{name}.padding", true, rows, max(begin - vocab_size, 0), padded - vocab_size
    else:
        yield name, 0, rows, rows * rank, rows * ranks
