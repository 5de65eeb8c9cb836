"""Whether a source holds the model that its config describes: asked before anything is written."""

import torch

from megatron.checkpoint.convert.base import Source
from megatron.checkpoint.state import MODEL, PADDING, check
from megatron.config.parallel import ParallelConfig
from megatron.errors import CheckpointError
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.model.partition import stages_of

_EMBEDDING = "embedding.word.weight"


def check_agreement(source: Source, what: str) -> None:
    """Hold names and shapes of a source against its config. `what` names it in messages.

    Raises:
        CheckpointError: tensors are missing, unknown or of other shapes.
    """
    specs = source.specs()
    if _EMBEDDING not in specs or len(specs[_EMBEDDING].shape) != 2:
        raise CheckpointError(f"{what} holds no word embedding: the checkpoint is damaged")
    rows = specs[_EMBEDDING].shape[0]
    config = source.config
    stages = stages_of(config.model, config.exits, ParallelConfig())
    with torch.device("meta"):
        model = GPT(config.model, config.exits, stages, rows)
    found = {MODEL + name: (spec.shape, spec.dtype) for name, spec in specs.items() if not name.endswith(PADDING)}
    wanted = {}
    for name, part in model_state(model, rows).items():
        if not name.endswith(PADDING):
            wanted[MODEL + name] = part.shape, found.get(MODEL + name, (None, part.view.dtype))[1]
    check(found, wanted, what)
