"""Which pipeline stage owns which layers and exits. The single source of ownership; no torch."""

from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.exits.spec import ExitSpec


@dataclass(frozen=True)
class StageSpec:
    """A span of layers [first, last) of the model (from 0) plus the exits inside it."""

    index: int
    first: int
    last: int
    exits: tuple[ExitSpec, ...]
    is_first: bool
    is_last: bool


def partition(num_layers: int, exits: tuple[ExitSpec, ...], num_stages: int) -> tuple[StageSpec, ...]:
    """Cut the layers into equal stages; an exit belongs to the stage of the layer it taps.

    Raises ConfigError where layers don't divide or an exit lies outside the model.
    """
    if num_layers % num_stages:
        raise ConfigError(f"--num-layers {num_layers} does not divide into {num_stages} pipeline stages of equal depth")
    for spec in exits:
        if not 0 <= spec.layer < num_layers:
            raise ConfigError(f"--exit-layer-nums: exit {spec.label} is not a layer of 1..{num_layers}")
    depth = num_layers // num_stages
    return tuple(
        StageSpec(
            index,
            index * depth,
            (index + 1) * depth,
            tuple(spec for spec in exits if index * depth <= spec.layer < (index + 1) * depth),
            index == 0,
            index == num_stages - 1,
        )
        for index in range(num_stages)
    )
