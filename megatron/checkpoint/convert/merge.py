"""Exits that were tuned apart (EE-Tuning), put into the whole model that they were tuned on."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint import legacy_names as names
from megatron.checkpoint.convert.base import Source, TensorSpec
from megatron.checkpoint.convert.derived import Derived, Origin, copy_of, origins
from megatron.checkpoint.convert.exits import own_head, per_exit
from megatron.checkpoint.state import PADDING
from megatron.config.model import ExitConfig
from megatron.config.rules import check
from megatron.errors import ConfigError

_WORD = "embedding.word.weight"
# What the backbone computes; a tuned exit fits no other.
_BACKBONE = (
    *("num_layers", "hidden_size", "ffn_size", "num_attention_heads", "num_kv_heads", "normalization", "activation"),
    *("position_embedding_type", "gated"),
)
_STRUCTURE = ("exit_norm", "use_exit_mlp", "use_exit_block", "pre_exit")


def merge_exits(base: Source, tuned: Source) -> Derived:
    """`base` with the exits of `tuned`: one of the same number is replaced, others stand beside those that are there.

    tuned: what a run with --tune-exit saved; all of it, its first stages, or the exits alone.

    Raises:
        ConfigError: the two are of different models, or the exits are built otherwise than those that are there.
    """
    _check_backbone(base, tuned)
    numbers = sorted({int(name.split(".")[1]) for name in tuned.specs() if name.startswith("exits.")})
    if not numbers:
        raise ConfigError("--merge-exits: that checkpoint has no exits with weights of their own")
    old, new = base.config.exits, tuned.config.exits
    _check_structure(old, new)
    config = replace(base.config, exits=_union(old, new, numbers))
    check(config, run=False, where="the merged exits")
    tensors = {name: origin for name, origin in origins(base).items() if not _is_of(name, numbers)}
    for number in numbers:
        tensors |= dict(_exit(base, tuned, number))
    if not old.untie_exit_output_weights:
        for number in set(old.exit_layer_nums) - set(
            numbers
        ):  # they get a matrix of their own, equal to what they used
            tensors |= dict(own_head(base, number, _WORD))
    return Derived(base, config, tensors)


def _check_backbone(base: Source, tuned: Source) -> None:
    differing = [
        f"{name} {ours} and {theirs}"
        for name in _BACKBONE
        if (ours := getattr(base.config.model, name)) != (theirs := getattr(tuned.config.model, name))
    ]
    if differing:
        raise ConfigError(
            f"--merge-exits: the exits were tuned on another model than --load-dir: {', '.join(differing)}"
        )


def _check_structure(old: ExitConfig, new: ExitConfig) -> None:
    if not old.exit_layer_nums:
        return
    for name in _STRUCTURE:
        ours, theirs = getattr(old, name), getattr(new, name)
        if ours != theirs:
            raise ConfigError(
                f"--merge-exits: all exits of a model are built alike, and {name} is {ours} in --load-dir, {theirs} in "
                "what was tuned"
            )


def _union(old: ExitConfig, new: ExitConfig, numbers: list[int]) -> ExitConfig:
    """Loss weights and the like are those of the tuned exits where there are two."""
    union = tuple(sorted({*old.exit_layer_nums, *numbers}))
    parts = {name: getattr(new, name) for name in _STRUCTURE}
    return replace(old, exit_layer_nums=union, untie_exit_output_weights=True, **parts, **per_exit(union, old, new))


def _exit(base: Source, tuned: Source, number: int) -> Iterator[tuple[str, Origin]]:
    """A tuned exit's tensors, vocabularies with as many rows, and padding, as the base's have."""
    for name, spec in tuned.specs().items():
        if not _is_of(name, [number]) or name.endswith(PADDING):
            continue
        if not names.has_vocabulary(name):
            yield name, copy_of(tuned, name, spec)
            continue
        for suffix in ("", PADDING):
            if _WORD + suffix in base.specs():
                like = base.specs()[_WORD + suffix]
                first = 0 if not suffix else base.specs()[_WORD].shape[0]
                yield name + suffix, _rows(tuned, name, TensorSpec(like.shape, spec.dtype), first)


def _rows(tuned: Source, name: str, spec: TensorSpec, first: int) -> Origin:
    """So many rows of a matrix from `first` on, its padding being the last ones; zero where it has fewer."""

    def read() -> Tensor:
        parts = [tuned.read(part) for part in (name, name + PADDING) if part in tuned.specs()]
        found = torch.cat(parts)[first : first + spec.shape[0]]
        return torch.cat((found, found.new_zeros(spec.shape[0] - len(found), *spec.shape[1:])))

    return Origin(spec, read)


def _is_of(name: str, numbers: list[int]) -> bool:
    return name.startswith("exits.") and int(name.split(".")[1]) in numbers
