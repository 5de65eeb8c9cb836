"""Names and cuts of Megatron's tensors: how a file's dotted names become ours, and along which dimension they join.

Pure functions on names; layers are local to a stage in a file, from 0 and global in ours.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron.errors import CheckpointError

_DEEPEST = 50
TIED_COPY = "word_embeddings_for_head.weight"

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "input_norm": "input_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.dense": "attention.proj",
    "post_attention_norm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_OF_TRUNK = {f"mlp.trunk.{name}": f"mlp.{name}" for name in ("dense_h_to_4h", "dense_4h_to_h")}
_OF_EXIT = {
    "exit_norm": "norm",
    "mlp.branch.dense_h_to_4h": "branch.up",
    "mlp.branch.dense_4h_to_h": "branch.down",
    **{f"exit_block.{theirs}": f"block.{ours}" for theirs, ours in _IN_LAYER.items()},
}
_TOP = {
    "embedding.word_embeddings": "embedding.word",
    "embedding.position_embeddings": "embedding.position",
    "encoder.final_norm": "final_norm",
    "output_layer": "output",
}
_LAYER_OURS = re.compile(r"layers\.(\d+)\.(.+)")
_EXIT_OURS = re.compile(r"exits\.(\d+)\.(.+)")
_HEAD = re.compile(r"exit_output_layer\.(\d+)\.weight")


def flatten(model: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Nested dictionaries of a rank's `model` as one: dotted names in today's spelling, in the file's order.

    Raises:
        CheckpointError: one of them stands in several places, or in itself; `where` says of which file.
    """
    flat: dict[str, Tensor] = {}
    met: set[int] = set()

    def walk(part: Mapping[str, Any], prefix: str) -> None:
        if (part and id(part) in met) or prefix.count(".") > _DEEPEST:
            raise CheckpointError(f"{where}: refused: the model's {prefix[:80]} is nested without end or repeated")
        met.add(id(part))
        for key, value in part.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                walk(value, f"{name}.")
            elif isinstance(value, Tensor):
                flat[_today(name)] = value.detach()

    walk(model, "")
    return flat


def _today(name: str) -> str:
    """Undo the renamings of the format's history."""
    name = re.sub(r"^transformer\.", "encoder.", name.removeprefix("language_model."))
    if name.startswith("encoder."):
        name = name.replace("layernorm", "norm").replace(".attention.", ".self_attention.")
    return name


def layer_numbers(flat: Mapping[str, Tensor]) -> set[int]:
    """The local numbers of the layers a stage holds."""
    return {int(match[1]) for name in flat if (match := _LAYER.match(name))}


def native_name(legacy: str, first_layer: int, exits: tuple[int, ...]) -> str | None:
    """Our name of a tensor in a stage that starts at `first_layer` (from 0) and has `exits` (numbers from 1).

    None if no GPT of ours has such a tensor. Untied heads are numbered within their stage, in the order of `exits`.
    """
    path, _, kind = legacy.rpartition(".")
    if path in _TOP:
        return f"{_TOP[path]}.{kind}"
    if (head := _HEAD.fullmatch(legacy)) and int(head[1]) < len(exits):
        return f"exits.{exits[int(head[1])]}.output.weight"
    if match := _LAYER.fullmatch(path):
        layer, inner = first_layer + int(match[1]), match[2]
        if inner in _OF_EXIT:
            return f"exits.{layer + 1}.{_OF_EXIT[inner]}.{kind}"
        inner = _OF_TRUNK.get(inner, inner)
        if inner in _IN_LAYER:
            return f"layers.{layer}.{_IN_LAYER[inner]}.{kind}"
    return None


def legacy_path(name: str, first_layer: int, exits: tuple[int, ...], branched: bool) -> tuple[str, ...]:
    """Where a file's `model` keeps a tensor of ours that lies in such a stage: the keys of its nested dictionaries.

    The inverse of `native_name`; a gate has no place of its own, it stands above its `up`. branched: exits have an MLP
    of their own, so that the layer's is called trunk.
    """
    path, _, kind = name.rpartition(".")
    tops = {ours: theirs for theirs, ours in _TOP.items()}
    if path in tops:
        module, _, part = tops[path].rpartition(".")
        if module == "encoder":
            return "language_model", module, f"{part}.{kind}"
        return ("language_model", module, part, kind) if module else ("language_model", part, kind)
    if match := _EXIT_OURS.fullmatch(path):
        number, inner = int(match[1]), match[2]
        if inner == "output":
            return "language_model", "exit_output_layer", f"{exits.index(number)}.{kind}"
        layer, theirs = number - 1, {ours: theirs for theirs, ours in _OF_EXIT.items()}[inner]
    else:
        match = _LAYER_OURS.fullmatch(path)
        layer, inner = int(match[1]), match[2]
        theirs = {ours: theirs for theirs, ours in _IN_LAYER.items()}[inner]
        if branched and layer + 1 in exits:
            theirs = theirs.replace("mlp.dense", "mlp.trunk.dense")
    return "language_model", "encoder", f"layers.{layer - first_layer}.{theirs}.{kind}"


def split_dim(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks share a tensor of ours; None if each has it whole."""
    module, kind = name.rsplit(".", 1)
    if has_vocabulary(name) or is_qkv(name) or is_up(name):
        return 0
    return 1 if kind == "weight" and module.endswith((".proj", ".down")) else None


def has_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are vocabulary entries; `name` may carry the prefix of a state key."""
    return name.endswith(("embedding.word.weight", "/output.weight", ".output.weight")) or name == "output.weight"


def is_qkv(name: str) -> bool:
    """Whether a tensor is the fused query, key, value projection."""
    return ".attention.qkv." in name


def is_up(name: str) -> bool:
    """Whether a tensor widens in an MLP; a file stacks the gate above it, shard by shard."""
    return ".up." in name


def gate_of(name: str) -> str:
    """The gate that belongs to an `up` tensor."""
    return name.replace(".up.", ".gate.")
