"""From a run's config to its model: shared by training and inference."""

import torch

from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.model.gpt import GPT
from megatron.model.partition import stages_of, stages_of_rank
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import TensorParallel
from megatron.tokenizer.base import padded_vocab_size


def build_model(config: RunConfig, mesh: Mesh, vocab_size: int, dtype: torch.dtype | None = None) -> GPT:
    """This rank's stages of the model, on its device and in its dtype, uninitialised."""
    stages = stages_of(config.model, config.exits, config.parallel)
    mine = stages_of_rank(stages, mesh.rank("pp"), mesh.size("pp"))
    rows = padded_rows(config, vocab_size)
    tp = TensorParallel.of(mesh, config.parallel.sequence_parallel)
    with torch.device("meta"):
        model = GPT(config.model, config.exits, mine, rows, config.training, tp)
    model = model.to(dtype or getattr(torch, config.precision.params_dtype))
    return model.to_empty(device=mesh.backend.device)


def padded_rows(config: RunConfig, vocab_size: int) -> int:
    """Rows of vocabulary matrices. Raises ConfigError where --padded-vocab-size is too small."""
    fixed = config.model.padded_vocab_size
    if fixed is None:
        return padded_vocab_size(
            vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
        )
    if fixed < vocab_size:
        raise ConfigError(
            f"--padded-vocab-size {fixed} is smaller than the tokenizer's {vocab_size} ids: "
            "raise it, or use the tokenizer that made the data"
        )
    return fixed
