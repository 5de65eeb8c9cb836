"""Writes small checkpoints as Megatron-LM and EE-LLM lay them out, from the format's description alone."""

import argparse
import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HIDDEN, FFN, HEADS, PADDED, POSITIONS = 8, 16, 4, 16, 6

SCHEDULER = {
    "max_lr": 0.1,
    "min_lr": 0.0,
    "lr_decay_style": "linear",
    "lr_decay_steps": 200,
    "lr_warmup_steps": 0,
    "num_steps": 112,
    "start_wd": 0.01,
    "end_wd": 0.01,
    "wd_incr_style": "constant",
    "wd_incr_steps": 200,
}
SCALER = {"scale": torch.tensor([8.0]), "growth_tracker": 3, "hysteresis_tracker": -2}


class ModelType(enum.Enum):
    encoder_or_decoder = 1


@dataclass
class Parameter:
    """A whole tensor: its name in a file (layer number left out), ours, and how tensor parallelism cuts it."""

    legacy: str
    ours: tuple[str, ...]
    tensors: tuple[Tensor, ...]  # (gate, up) for a gated projection, else one
    dim: int | None = None
    layer: int | None = None

    def shard(self, rank: int, tp: int) -> Tensor:
        if self.dim is None:
            return self.tensors[0].clone()
        return torch.cat([tensor.chunk(tp, self.dim)[rank] for tensor in self.tensors])


@dataclass
class Recipe:
    """What is written, and how. `exits` in the order of --exit-layer-nums."""

    layers: int = 4
    tp: int = 1
    pp: int = 1
    chunks: int = 1
    exits: tuple[int, ...] = ()
    exit_norm: bool = False
    exit_mlp: bool = False
    exit_block: bool = False
    untied_exits: bool = False
    untied: bool = False
    gated: bool = False
    bias: bool = True
    iteration: int = 7
    version: float | None = 3.0
    optimizer: str | None = None  # "fp32", "mixed" or "sharded"
    tune_exit: bool = False
    args: dict[str, Any] = field(default_factory=dict)


class Maker:
    """Makes parameters of a recipe's shapes with random values."""

    def __init__(self, recipe: Recipe, seed: int):
        self.recipe = recipe
        self.made: list[Parameter] = []
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, legacy: str, ours: str, shape: tuple[int, ...], dim: int | None = None, layer: int | None = None):
        self.made.append(Parameter(legacy, (ours,), (torch.randn(shape, generator=self.generator),), dim, layer))

    def norm(self, legacy: str, ours: str, layer: int | None):
        for kind in ("weight", "bias") if self.recipe.bias else ("weight",):
            self.add(f"{legacy}.{kind}", f"{ours}.{kind}", (HIDDEN,), None, layer)

    def linear(self, legacy: str, ours: str, shape: tuple[int, int], dim: int, layer: int):
        self.add(f"{legacy}.weight", f"{ours}.weight", shape, dim, layer)
        if self.recipe.bias:
            self.add(f"{legacy}.bias", f"{ours}.bias", shape[:1], 0 if dim == 0 else None, layer)

    def mlp(self, legacy: str, ours: str, layer: int):
        start = len(self.made)
        self.linear(f"{legacy}.dense_h_to_4h", f"{ours}.up", (FFN, HIDDEN), 0, layer)
        for parameter in self.made[start:] if self.recipe.gated else []:
            gate = torch.randn(parameter.tensors[0].shape, generator=self.generator)
            parameter.tensors = (gate, *parameter.tensors)
            parameter.ours = (parameter.ours[0].replace(".up.", ".gate."), *parameter.ours)
        self.linear(f"{legacy}.dense_4h_to_h", f"{ours}.down", (HIDDEN, FFN), 1, layer)

    def block(self, legacy: str, ours: str, layer: int, branched: bool = False):
        self.norm(f"{legacy}input_norm", f"{ours}input_norm", layer)
        self.linear(f"{legacy}self_attention.query_key_value", f"{ours}attention.qkv", (3 * HIDDEN, HIDDEN), 0, layer)
        self.linear(f"{legacy}self_attention.dense", f"{ours}attention.proj", (HIDDEN, HIDDEN), 1, layer)
        self.norm(f"{legacy}post_attention_norm", f"{ours}mlp_norm", layer)
        self.mlp(f"{legacy}mlp.trunk" if branched else f"{legacy}mlp", f"{ours}mlp", layer)

    def exit_layer(self, layer: int):
        if self.recipe.exit_norm:
            self.norm("exit_norm", f"exits.{layer + 1}.norm", layer)
        if self.recipe.exit_block:
            self.block("exit_block.", f"exits.{layer + 1}.block.", layer)
        self.block("", f"layers.{layer}.", layer, branched=self.recipe.exit_mlp)
        if self.recipe.exit_mlp:
            self.mlp("mlp.branch", f"exits.{layer + 1}.branch", layer)


def parameters(recipe: Recipe, seed: int = 0) -> list[Parameter]:
    """Every parameter of the model, layer by layer, in the order in which the original registers them."""
    maker = Maker(recipe, seed)
    maker.add("embedding.word_embeddings.weight", "embedding.word.weight", (PADDED, HIDDEN), 0)
    maker.add("embedding.position_embeddings.weight", "embedding.position.weight", (POSITIONS, HIDDEN))
    for layer in range(recipe.layers):
        if layer + 1 in recipe.exits:
            maker.exit_layer(layer)
        else:
            maker.block("", f"layers.{layer}.", layer)
    maker.norm("encoder.final_norm", "final_norm", None)
    if recipe.untied:
        maker.add("output_layer.weight", "output.weight", (PADDED, HIDDEN), 0)
    for number in recipe.exits if recipe.untied_exits else ():
        maker.add("exit_output_layer", f"exits.{number}.output.weight", (PADDED, HIDDEN), 0, number - 1)
    return maker.made


def whole(made: list[Parameter], prefix: str) -> dict[str, Tensor]:
    """Expected tensors by state key."""
    pairs = ((f"{prefix}{name}", t) for p in made for name, t in zip(p.ours, p.tensors, strict=True))
    return dict(pairs)


def write(root: Path, recipe: Recipe) -> dict[str, Tensor]:
    """Write `iter_*` and the tracker under `root`; returns what a reader should find, by state key."""
    made = parameters(recipe)
    sets = {"exp_avg": parameters(recipe, 1), "exp_avg_sq": parameters(recipe, 2)}
    if recipe.optimizer == "mixed":
        sets["master"] = parameters(recipe, 3)
    directory = root / f"iter_{recipe.iteration:07d}"
    for t in range(recipe.tp):
        for p in range(recipe.pp):
            name = f"mp_rank_{t:02d}_{p:03d}" if recipe.pp > 1 else f"mp_rank_{t:02d}"
            (directory / name).mkdir(parents=True)
            torch.save(_rank(recipe, made, sets, t, p), directory / name / "model_optim_rng.pt")
            if recipe.optimizer == "sharded":
                (directory / name / "distrib_optim.pt").write_bytes(b"")
    (root / "latest_checkpointed_iteration.txt").write_text(str(recipe.iteration))
    expected = whole(made, "model/")
    if recipe.optimizer in ("fp32", "mixed"):
        for kind, values in sets.items():
            kept = [p for p in values if not recipe.tune_exit or _trained_under_tuning(p)]
            expected |= whole(kept, f"optimizer/{kind}/")
    return expected


def _trained_under_tuning(parameter: Parameter) -> bool:
    return "exit" in parameter.legacy or ".branch." in parameter.legacy


def _local(recipe: Recipe, made: list[Parameter], t: int, p: int, chunk: int) -> dict[str, Tensor]:
    """Shards of one stage by dotted name, encoder last but for the heads: registration order."""
    per = recipe.layers // (recipe.pp * recipe.chunks)
    first = (chunk * recipe.pp + p) * per
    is_first, is_last = p + chunk == 0, (p, chunk) == (recipe.pp - 1, recipe.chunks - 1)
    mine, heads = {}, 0
    for parameter in made:
        if parameter.layer is not None and not first <= parameter.layer < first + per:
            continue
        name = parameter.legacy
        if name == "exit_output_layer":
            name, heads = f"exit_output_layer.{heads}.weight", heads + 1
        elif parameter.layer is not None:
            name = f"encoder.layers.{parameter.layer - first}.{name}"
        elif not (is_first if name.startswith("embedding") else is_last):
            continue
        mine[name] = parameter.shard(t, recipe.tp)
    has_exit = any(first < number <= first + per for number in recipe.exits)
    if not recipe.untied and not is_first and (is_last or has_exit):
        mine["word_embeddings_for_head.weight"] = made[0].shard(t, recipe.tp)
    return mine


def _nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    model: dict[str, Any] = {"language_model": {"embedding": {}, "encoder": OrderedDict()}}
    for name, tensor in flat.items():
        top, rest = name.split(".", 1)
        if top == "word_embeddings_for_head":
            model[top] = OrderedDict({rest: tensor})
        elif top == "embedding":
            part, kind = rest.split(".")
            model["language_model"]["embedding"][part] = OrderedDict({kind: tensor})
        else:
            model["language_model"].setdefault(top, OrderedDict())[rest] = tensor
    return model


def _rank(recipe: Recipe, made: list[Parameter], sets: dict[str, list[Parameter]], t: int, p: int) -> dict[str, Any]:
    args = {
        "num_layers": recipe.layers,
        "num_attention_heads": HEADS,
        "tensor_model_parallel_size": recipe.tp,
        "pipeline_model_parallel_size": recipe.pp,
        "swiglu": recipe.gated,
        "params_dtype": torch.float32,
        "model_type": ModelType.encoder_or_decoder,
        "consumed_train_samples": 112,
        **({"exit_layer_nums": list(recipe.exits), "tune_exit": recipe.tune_exit} if recipe.exits else {}),
        **recipe.args,
    }
    state: dict[str, Any] = {"args": argparse.Namespace(**args), "iteration": recipe.iteration}
    if recipe.version is not None:
        state["checkpoint_version"] = recipe.version
    for chunk in range(recipe.chunks):
        key = f"model{chunk}" if recipe.chunks > 1 else "model"
        state[key] = _nested(_local(recipe, made, t, p, chunk))
    if recipe.optimizer:
        state["optimizer"] = _optimizer(recipe, made, sets, t, p)
        state["opt_param_scheduler"] = dict(SCHEDULER)
    return state


def _optimizer(recipe: Recipe, made: list[Parameter], sets: dict[str, list[Parameter]], t: int, p: int):
    if recipe.optimizer == "sharded":
        return {"optimizer": {"param_groups": [{"lr": 0.1, "step": 7}]}}
    groups: tuple[list, list] = ([], [])
    for chunk in range(recipe.chunks):
        shards = {kind: _local(recipe, values, t, p, chunk) for kind, values in sets.items()}
        own = ("word_embeddings_for_head.weight", "output_layer.weight")
        if recipe.exits:
            order = sorted(shards["exp_avg"], key=lambda name: name not in own)
        else:
            order = sorted(shards["exp_avg"], key=lambda name: name in own)
        for name in order:
            if not recipe.tune_exit or "exit" in name or ".branch." in name:
                entry = {kind: values[name] for kind, values in shards.items()}
                groups[entry["exp_avg"].dim() == 1].append(entry)
    state, numbered, masters = {}, [], []
    for group in filter(None, groups):
        start = len(state)
        masters.append([entry.pop("master") for entry in group if "master" in entry])
        state |= dict(enumerate(group, start))
        numbered.append({"wd_mult": 1.0, "step": 7, "params": list(range(start, len(state)))})
    inner = {"state": state, "param_groups": numbered}
    if recipe.optimizer == "fp32":
        return inner
    return {"optimizer": inner, "fp32_from_fp16_params": masters, "grad_scaler": dict(SCALER)}


@pytest.fixture
def legacy() -> Iterator[Callable[[Path, Recipe], dict[str, Tensor]]]:
    """`legacy(root, Recipe(...))` writes a checkpoint and returns the tensors that reading should give."""
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = ModelType
    ModelType.__module__, ModelType.__qualname__ = module.__name__, "ModelType"
    sys.modules["megatron.core"] = types.ModuleType("megatron.core")
    sys.modules[module.__name__] = module
    try:
        yield write
    finally:
        del sys.modules[module.__name__], sys.modules["megatron.core"]


@pytest.fixture
def recipe() -> type[Recipe]:
    return Recipe
