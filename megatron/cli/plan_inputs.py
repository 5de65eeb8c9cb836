"""What a plan needs beside a run's flags: the device it is for, and how large the vocabulary is. No torch."""

import argparse
from dataclasses import asdict

from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.planning.device import PRESETS, Device, overruled, preset, read_profile
from megatron.tokenizer.base import padded_vocab_size
from megatron.tokenizer.build import build_tokenizer


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """`--device` and what overrules it."""
    group = parser.add_argument_group("the devices")
    group.add_argument("--device", default="A100-80GB", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    group.add_argument("--device-flops", type=float, metavar="TFLOPS", help="what its layers reach, in TFLOP/s")
    group.add_argument("--device-memory", type=float, metavar="GB", help="memory that a run may use, in GB")
    group.add_argument("--bandwidth-within", type=float, metavar="GB/S", help="from device to device in a node")
    group.add_argument("--bandwidth-between", type=float, metavar="GB/S", help="from device to device across nodes")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="devices of a node")
    group.add_argument("--profile", metavar="FILE", help="JSON with what was measured on the cluster")


def chosen_device(options: argparse.Namespace, dtype: str) -> Device:
    """The device that the flags describe. Raises ConfigError where they don't."""
    device = preset(options.device, dtype)
    if options.profile:
        device = read_profile(options.profile, device)
    figures = {
        "flops_per_s": _times(options.device_flops, 1e12),
        "memory": _times(options.device_memory, 1e9),
        "within": _times(options.bandwidth_within, 1e9),
        "between": _times(options.bandwidth_between, 1e9),
        "per_node": options.gpus_per_node,
    }
    return overruled(device, figures)


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def vocabulary_rows(config: RunConfig, tp: int = 1) -> int:
    """Rows of vocabulary matrices, from --padded-vocab-size or the tokenizer, padded for so many ranks.

    Raises ConfigError where none is given.
    """
    if config.model.padded_vocab_size:
        return config.model.padded_vocab_size
    if config.tokenizer.tokenizer_type is None:
        raise ConfigError("how large the vocabulary is isn't said: give --padded-vocab-size, or the tokenizer's flags")
    tokenizer = build_tokenizer(**asdict(config.tokenizer))
    return padded_vocab_size(tokenizer.vocab_size, config.model.make_vocab_size_divisible_by, tp)
