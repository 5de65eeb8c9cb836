"""Exits for a model that has none, or not enough; and exits moved between a layer's output and the next one's input.

What new parts start from: the output matrix and the norm of the model's own end, the MLP of the exit's own layer, the
model's last layer for a block; or values freshly drawn.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron.checkpoint.convert.base import Source, TensorSpec
from megatron.checkpoint.convert.derived import Derived, Origin, copy_of, origins
from megatron.checkpoint.state import PADDING
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.rules import check
from megatron.config.stored import PER_EXIT
from megatron.errors import ConfigError
from megatron.logs import get_logger
from megatron.model.init import initial_value

_DEFAULTS = {"exit_layer_weight": 1.0, "exit_layer_weight_init": 0.0, "exit_layer_temperature": 1.0}
_log = get_logger(__name__)

Position = Literal["pre", "post"]


@dataclass(frozen=True)
class NewExits:
    """What is to be added. numbers: layers from 1. position: None is that of exits already there, else "post".

    tied: the output matrix is the word embedding, not a copy. std: of values drawn; None: as the model was.
    """

    numbers: tuple[int, ...]
    norm: Literal["none", "own", "final"] = "none"
    mlp: bool = False
    block: bool = False
    position: Position | None = None
    tied: bool = False
    random: bool = False
    std: float | None = None
    seed: int = 1234

    @property
    def shape(self) -> tuple[str, bool, bool]:
        """What all exits of a model have in common."""
        return self.norm, self.mlp, self.block


def add_exits(source: Source, new: NewExits) -> Derived:
    """`source` with more exits; those that are there stay as they are.

    Raises:
        ConfigError: a layer doesn't exist, nothing would be added, or the new exits can't stand beside the others.
    """
    old, model = source.config.exits, source.config.model
    added = sorted(set(new.numbers) - set(old.exit_layer_nums))
    if not added:
        raise ConfigError(f"exits {_spaced(new.numbers)} are there already: nothing is to be added")
    if old.exit_layer_nums:
        _check_alike(old, new)
    if new.tied and model.untie_embeddings_and_output_weights and not old.exit_layer_nums:
        raise ConfigError(
            "--tie-exit-output-weights: this model's own head isn't tied to its word embedding, which a tied exit "
            "would have to use: leave the flag out"
        )
    exits = _with(old, new, added)
    config = replace(source.config, exits=exits)
    check(config, run=False, where="the exits asked for")
    tensors = origins(source)
    for number in added:
        for name, origin in _parts(source, number, new, exits.untie_exit_output_weights):
            tensors[name] = _drawn(name, origin.spec, model, new) if new.random else origin
    if exits.untie_exit_output_weights and not old.untie_exit_output_weights:
        for number in old.exit_layer_nums:  # they get a matrix of their own, equal to what they used
            tensors |= dict(own_head(source, number, "embedding.word.weight"))
    return Derived(source, config, tensors)


def declare_exits(source: Source, numbers: tuple[int, ...]) -> Derived:
    """`source` with exits that use the model's own final norm and head, as it was trained to leave at any layer.

    Where the head is the word embedding nothing is added; else each exit gets a copy of it, since a tied exit uses the
    word embedding. Errors as for `add_exits`.
    """
    untied = source.config.model.untie_embeddings_and_output_weights
    if untied:
        _log.info("the model's head isn't tied to its word embedding: each exit gets a copy of it")
    return add_exits(source, NewExits(numbers, norm="final", tied=not untied))


def move_exits(source: Source, target: Position) -> Derived:
    """`source` with every exit at the input of the next layer instead of the output of its own, or back.

    Raises:
        ConfigError: there are no exits, they are there already, one has no such place, or an MLP holds it back.
    """
    old = source.config.exits
    if not old.exit_layer_nums:
        raise ConfigError("there are no exits to move: add some with --conversion-type add-exit")
    if old.pre_exit == (target == "pre"):
        raise ConfigError(f"the exits are in position {target} already: nothing is to be moved")
    if old.use_exit_mlp:
        raise ConfigError("exits with an MLP of their own can't move: its branch leaves at the layer's output")
    shift, depth = 1 if target == "pre" else -1, source.config.model.num_layers
    moved = {number: number + shift for number in old.exit_layer_nums}
    if outside := [number for number, place in moved.items() if not 1 <= place <= depth]:
        ends = "after the last layer: no layer's input" if target == "pre" else "before the first layer: no output"
        raise ConfigError(f"exit {outside[0]} can't move to position {target}: it would stand {ends}")
    exits = replace(old, exit_layer_nums=tuple(moved.values()), pre_exit=target == "pre")
    tensors = {_renumbered(name, moved): origin for name, origin in origins(source).items()}
    config = replace(source.config, exits=exits)
    check(config, run=False, where="the moved exits")
    return Derived(source, config, tensors)


def _renumbered(name: str, moved: Mapping[int, int]) -> str:
    if not name.startswith("exits."):
        return name
    _, number, rest = name.split(".", 2)
    return f"exits.{moved[int(number)]}.{rest}"


def _check_alike(old: ExitConfig, new: NewExits) -> None:
    """All exits of a model are built alike."""
    there = (old.exit_norm, old.use_exit_mlp, old.use_exit_block)
    if new.shape != there:
        raise ConfigError(
            f"exits {_spaced(old.exit_layer_nums)} have {_described(*there)}, the new ones would have "
            f"{_described(*new.shape)}, and all exits of a model are built alike: ask for the same parts"
        )
    if new.position is not None and old.pre_exit != (new.position == "pre"):
        raise ConfigError(
            f"exits {_spaced(old.exit_layer_nums)} are in position {'pre' if old.pre_exit else 'post'}, the new ones "
            f"would be in {new.position}: leave --target-exit-position out, or move the others first"
        )
    if new.tied and old.untie_exit_output_weights:
        raise ConfigError(
            f"exits {_spaced(old.exit_layer_nums)} have output matrices of their own, which would be lost: leave "
            "--tie-exit-output-weights out"
        )


def _described(norm: str, mlp: bool, block: bool) -> str:
    norms = {"own": ["a norm (--use-exit-norm)"], "final": ["the final norm (--exits-at)"], "none": []}[norm]
    parts = norms + ["an MLP (--use-exit-mlp)"] * mlp + ["a block (--use-exit-block)"] * block
    return " and ".join(parts) or "a bare head"


def _with(old: ExitConfig, new: NewExits, added: list[int]) -> ExitConfig:
    """The config of old and new exits, deepest last; loss weights of the new ones are the defaults."""
    numbers = tuple(sorted({*old.exit_layer_nums, *added}))
    return replace(
        old,
        exit_layer_nums=numbers,
        exit_norm=new.norm,
        use_exit_mlp=new.mlp,
        use_exit_block=new.block,
        pre_exit=old.pre_exit if old.exit_layer_nums else new.position == "pre",
        untie_exit_output_weights=not new.tied,
        **per_exit(numbers, old),
    )


def per_exit(numbers: Iterable[int], *configs: ExitConfig) -> dict[str, tuple[float, ...]]:
    """The lists with one value for each exit; of several configs that know one the last counts, else the default."""
    lists: dict[str, tuple[float, ...]] = {}
    for name in PER_EXIT:
        known: dict[int, float] = {}
        for config in configs:
            known |= dict(zip(config.exit_layer_nums, getattr(config, name), strict=False))
        lists[name] = tuple(known.get(number, _DEFAULTS[name]) for number in numbers) if known else ()
    return lists


def _parts(source: Source, number: int, new: NewExits, untied: bool) -> Iterator[tuple[str, Origin]]:
    """The tensors of a new exit and what they are copied from."""
    own, last = f"layers.{number - 1}.mlp.", f"layers.{source.config.model.num_layers - 1}."
    pairs = (
        [("final_norm.", "norm.")] * (new.norm == "own") + [(own, "branch.")] * new.mlp + [(last, "block.")] * new.block
    )
    for theirs, ours in pairs:
        for name in source.specs():
            if name.startswith(theirs):
                yield f"exits.{number}.{ours}{name.removeprefix(theirs)}", copy_of(source, name)
    if untied:
        head = "output.weight" if source.config.model.untie_embeddings_and_output_weights else "embedding.word.weight"
        yield from own_head(source, number, head)


def own_head(source: Source, number: int, head: str) -> Iterator[tuple[str, Origin]]:
    """An output matrix for an exit, copied with its padding from the tensor `head`."""
    yield f"exits.{number}.output.weight", copy_of(source, head)
    if head + PADDING in source.specs():
        yield f"exits.{number}.output.weight{PADDING}", copy_of(source, head + PADDING)


def _drawn(name: str, spec: TensorSpec, model: ModelConfig, new: NewExits) -> Origin:
    config = replace(model, init_method_std=model.init_method_std if new.std is None else new.std)

    def read() -> Tensor:
        return initial_value(name, spec.shape, config, new.seed).to(spec.dtype)

    return Origin(spec, read)


def _spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, sorted(numbers)))
