"""What a device can do: the figures that turn work into time and say what fits. No torch.

A device is a preset (peaks from the vendors' data sheets, and the share of them that layers reach), single figures of
one overruled, or a measured profile.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.errors import ConfigError

NOTHING: Mapping[str, float] = MappingProxyType({})
AXES = ("tp", "dp", "pp")
ACTIONS = ("layer_forward", "layer_backward", "head")


@dataclass(frozen=True)
class Device:
    """One accelerator (or process) of a cluster of equals.

    flops_per_s: what layers reach, in the run's dtype. memory: bytes that a run may use. memory_bandwidth: bytes/s.
    within, between: bytes/s that a device sends to another of its node, and to another node. per_node: devices. axes:
    measured bytes/s along mesh axes, which overrule the links. actions: measured seconds per token of `layer_forward`,
    `layer_backward` and `head` (an output matrix with its loss, forward and backward), for one process.
    """

    name: str
    flops_per_s: float
    memory: float
    memory_bandwidth: float
    within: float
    between: float
    per_node: int = 8
    kind: str = "cuda"
    axes: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    actions: Mapping[str, float] = field(default_factory=lambda: NOTHING)

    def link(self, axis: str, span: int) -> float:
        """Bytes/s along a mesh axis whose groups reach over `span` consecutive ranks."""
        if axis in self.axes:
            return self.axes[axis]
        return self.within if span <= self.per_node else self.between


# Dense peaks in TFLOP/s (16-bit, fp32), attained share, GB, memory and link bandwidths in GB/s, devices a node.
_PRESETS: dict[str, tuple[float, float, float, float, float, float, float, int]] = {
    "A100-40GB": (312, 19.5, 0.60, 40, 1555, 300, 25, 8),
    "A100-80GB": (312, 19.5, 0.60, 80, 2039, 300, 25, 8),
    "H100": (989, 67, 0.50, 80, 3350, 450, 50, 8),
    "H200": (989, 67, 0.52, 141, 4800, 450, 50, 8),
    "L40S": (362, 91.6, 0.50, 48, 864, 32, 12.5, 8),
    "CPU-core": (0.02, 0.06, 0.60, 8, 10, 2, 1, 1),
}
PRESETS = tuple(_PRESETS)
LAYERS_REACH = 0.7  # of a large matrix product's rate: assumed, not measured
USABLE = 0.94  # of the memory: the rest is the driver's, the collectives' and the allocator's


def preset(name: str, dtype: str) -> Device:
    """The device of that name (any case) computing in that dtype. Raises ConfigError for an unknown one."""
    found = next((known for known in _PRESETS if known.lower() == name.lower()), None)
    if found is None:
        raise ConfigError(f"--device {name} is not known: one of {', '.join(PRESETS)}, or give --profile FILE")
    half, single, share, memory, bandwidth, within, between, per_node = _PRESETS[found]
    peak = single if dtype == "float32" else half
    kind = "cpu" if found.startswith("CPU") else "cuda"
    speeds = (bandwidth * 1e9, within * 1e9, between * 1e9)
    return Device(found, peak * 1e12 * share, memory * 1e9 * USABLE, *speeds, per_node, kind)


def named_like(product: str, memory: float, dtype: str) -> Device | None:
    """The preset that a GPU's product name speaks of, with so much memory as it says; None where none does."""
    fits = [name for name in PRESETS if name.split("-")[0] in product]
    if not fits:
        return None
    close = min((preset(name, dtype) for name in fits), key=lambda one: abs(one.memory / USABLE - memory))
    return replace(close, memory=memory * USABLE)


def overruled(device: Device, figures: Mapping[str, float | None]) -> Device:
    """With the figures that aren't None in place of its own. Raises ConfigError for one that is not above 0."""
    given = {name: value for name, value in figures.items() if value is not None}
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"the device's {name} is {value}: give a number above 0")
    return replace(device, name=f"{device.name}, with other figures", **given) if given else device


def read_profile(path: str, device: Device) -> Device:
    """`device` with what was measured: a JSON object with any of the keys flops_per_s, memory_bytes, bandwidth (an
    object with tp, dp, pp in bytes/s) and actions (an object, as `Device.actions`), or what tools/check_cluster.py
    wrote (ranks, links); other keys are left alone.

    Raises ConfigError where it is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--profile {path}: {error.strerror}; give a readable file") from error
    except ValueError as error:
        raise ConfigError(f"--profile {path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--profile {path}: expected an object, found {type(found).__name__}")
    changes: dict[str, Any] = _of_cluster(path, found) | {
        name: _positive(path, key, found[key])
        for key, name in (("flops_per_s", "flops_per_s"), ("memory_bytes", "memory"))
        if found.get(key) is not None
    }
    changes["axes"] = _table(path, "bandwidth", found.get("bandwidth"), AXES)
    changes["actions"] = _table(path, "actions", found.get("actions"), ACTIONS)
    if changes["actions"] and len(changes["actions"]) < len(ACTIONS):
        raise ConfigError(f"--profile {path}: actions needs all of {', '.join(ACTIONS)}")
    return replace(device, name=str(found.get("name", f"{device.name}, measured")), **changes)


def _of_cluster(path: str, found: dict[str, Any]) -> dict[str, Any]:
    """From a check of a cluster: its slowest rank, and its slowest sums over the ranks of a machine and of several."""
    try:
        changes: dict[str, Any] = {}
        if found.get("ranks"):
            changes["flops_per_s"] = LAYERS_REACH * min(rank["flops_per_second"] for rank in found["ranks"])
            changes["memory_bandwidth"] = min(rank["memory_bytes_per_second"] for rank in found["ranks"])
        per_machine = found.get("ranks_per_machine")
        if per_machine:
            changes["per_node"] = per_machine
        for name, apart in (("within", False), ("between", True)):
            rates = [
                group["bytes_per_second"]
                for link in found.get("links", ())
                if link["operation"] == "all_reduce"
                for group in link["groups"]
                if (len({rank // per_machine for rank in group["ranks"]}) > 1) is apart
            ]
            if rates:
                changes[name] = min(rates)
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"--profile {path}: ranks and links are not as tools/check_cluster.py writes them") from error
    return {name: _positive(path, name, value) for name, value in changes.items()} | (
        {"per_node": int(per_machine)} if per_machine else {}
    )


def _table(path: str, key: str, table: Any, names: tuple[str, ...]) -> dict[str, float]:
    if not isinstance(table or {}, dict):
        raise ConfigError(f"--profile {path}: {key} is an object with {', '.join(names)}")
    return {
        name: _positive(path, f"{key}.{name}", table[name]) for name in names if (table or {}).get(name) is not None
    }


def _positive(path: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--profile {path}: {key} is {value!r}, expected a number above 0")
    return float(value)
