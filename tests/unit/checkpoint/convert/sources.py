"""Toy models in memory as sources, and a source's model with the logits of all its heads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.convert.base import Source, TensorSpec
from megatron.checkpoint.convert.huggingface import HfSource
from megatron.checkpoint.state import copy_into
from megatron.config.model import ExitConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.model.build import build_model
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh
from megatron.testing.tiny import build_gpt, model_config

IDS, ROWS = 60, 64
EXITS = ExitConfig((1, 3), exit_norm="own", untie_exit_output_weights=True)


class ModelSource:
    """The state of `model`, whose vocabulary has `ids` true rows."""

    def __init__(self, model: GPT, config: RunConfig, ids: int, files: tuple[Path, ...] = ()) -> None:
        self.config, self.iteration, self.facts = config, 7, dict[str, Any]()
        self._state = {name: placed.view for name, placed in model_state(model, ids).items()}
        self._files = files

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name].clone()

    def tokenizer_files(self) -> list[Path]:
        return list(self._files)

    def close(self) -> None:
        self._state.clear()


def model_of(source: Source) -> GPT:
    """The model that training and generation would build, with the source's tensors."""
    tensors = {name: source.read(name) for name in source.specs()}
    ids = len(tensors["embedding.word.weight"])
    model = build_model(source.config, Mesh.build(ParallelConfig(), Backend.choose("gloo")), ids)
    copy_into(tensors, {name: placed.view for name, placed in model_state(model, ids).items()}, "the source")
    return model.eval()


@torch.no_grad()
def logits(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Head -> [batch, length, padded vocabulary]."""
    hidden = model.embedding(tokens, None, None)
    context = model.context(tokens.shape[1], hidden)
    _, taps = model(hidden, context, model.stages[0])
    return {
        label: (model.features(label, tap, context) @ model.output_weight(label).t()).transpose(0, 1)
        for label, tap in taps.items()
    }


def source(
    family: str = "llama", exits: ExitConfig = EXITS, dtype: torch.dtype = torch.float32, **changes: Any
) -> ModelSource:
    """A toy model with random weights, its vocabulary padded."""
    config = RunConfig(model=model_config(family, **changes), exits=exits)
    return ModelSource(build_gpt(config.model, exits, IDS, ROWS, dtype), config, IDS)


def whole(directory: Path) -> dict[str, Tensor]:
    """Everything a source gives, by native name."""
    found = HfSource(directory)
    return {name: found.read(name) for name in found.specs()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def change(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
