"""Toy models as sources, written in every format, and read back by what doesn't belong to the converter."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.checkpoint import megatron_legacy, native
from megatron.checkpoint.convert import megatron_target, native_target
from megatron.checkpoint.convert.base import Layout, TensorSpec
from megatron.checkpoint.convert.convert import Conversion, Report, convert
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.checkpoint.find import recognise
from megatron.checkpoint.state import MODEL, OPTIMIZER
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.run import RunConfig
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.testing.tiny import build_gpt, model_config
from tests.unit.checkpoint.convert.sources import source

VOCAB, PADDED = 60, 64
ITERATION = 7
WORDS = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB - 1)
KINDS = {
    "none": ExitConfig(),
    "tied": ExitConfig(exit_layer_nums=(1, 3)),
    "untied": ExitConfig(exit_layer_nums=(2, 4), untie_exit_output_weights=True),
    "norm": ExitConfig(exit_layer_nums=(4, 1), untie_exit_output_weights=True, exit_norm="own"),
    "mlp": ExitConfig(exit_layer_nums=(2, 4), use_exit_mlp=True, exit_norm="own"),
    "block": ExitConfig(exit_layer_nums=(1, 2, 4), use_exit_block=True, untie_exit_output_weights=True),
    "all": ExitConfig(
        exit_layer_nums=(3, 4), use_exit_mlp=True, use_exit_block=True, exit_norm="own", untie_exit_output_weights=True
    ),
    "pre": ExitConfig(exit_layer_nums=(2, 3), pre_exit=True, use_exit_block=True, exit_norm="own"),
}


class Memory:
    """A model in memory as a converter's source; `reads` counts how often each tensor was asked for."""

    def __init__(self, config: RunConfig, tensors: dict[str, Tensor], iteration: int = ITERATION) -> None:
        self.config, self.tensors, self.iteration = config, tensors, iteration
        self.facts: dict = {"consumed_samples": 112}
        self.reads: dict[str, int] = {}

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        self.reads[name] = self.reads.get(name, 0) + 1
        return self.tensors[name]

    def tokenizer_files(self) -> list[Path]:
        return []

    def close(self) -> None:
        pass


def config_of(model: ModelConfig, exits: ExitConfig) -> RunConfig:
    return replace(RunConfig(), model=replace(model, make_vocab_size_divisible_by=16), exits=exits, tokenizer=WORDS)


def toy(kind: str = "none", family: str = "gpt", dtype: torch.dtype = torch.float32, **changes: object) -> Memory:
    """A `gpt` or `llama` with the exits of KINDS[kind]; all its tensors are random, padding included."""
    config = config_of(model_config(family, **changes), KINDS[kind])
    return of_model(config, build_gpt(config.model, config.exits, VOCAB, PADDED, dtype))


def of_model(config: RunConfig, gpt: GPT) -> Memory:
    return Memory(config, {name: part.view.clone() for name, part in model_state(gpt, VOCAB).items()})


def nothing(path: Path) -> None:
    pass


def write_megatron(source: Memory, root: Path, tp: int = 1, pp: int = 1) -> Path:
    return megatron_target.write(source, root, Layout(tp, pp), nothing)


def write_native(source: Memory, root: Path) -> Path:
    return native_target.write(source, root, Layout(), nothing)


def read_model(root: Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint in either format, by the readers that runs use."""
    found = recognise(root)
    if found.format == "native":
        tensors = native.read(found.directory, ignore=(OPTIMIZER,)).tensors
    else:
        tensors = megatron_legacy.read(found.directory, VOCAB, with_optimizer=False).tensors
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)]
    assert not differing


def quietly(job: Conversion) -> Report:
    """`convert` without a bar; the bytes it tells of are those it announced."""
    announced, told = [], []

    def begin(total: int) -> Callable[[int], None]:
        announced.append(total)
        return told.append

    report = convert(job, begin)
    assert sum(told) == announced[0]
    return report


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Conversion]:
    """`job(source_root, from, to, …)`: into `tmp_path / "out"`."""

    def make(load: Path, source: str, target: str, **changes: object) -> Conversion:
        return replace(Conversion(load, tmp_path / "out", source, target), **changes)

    return make


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with exits in several files."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    write_hf(source(), directory, max_shard_bytes=40_000)
    return directory


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in exported.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory
