"""What a device can do: the figures that turn work into time. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator (or process) of a cluster of equals.

    flops_per_s: what large matrix products reach, in the run's dtype. memory: bytes. memory_bandwidth: bytes/s.
    within, between: bytes/s that a device sends to another of its node, and to another node. per_node: devices.
    """

    name: str
    flops_per_s: float
    memory: float
    memory_bandwidth: float
    within: float
    between: float
    per_node: int = 8

    def link(self, span: int) -> float:
        """Bytes/s among `span` consecutive ranks: within a node if they all fit into one."""
        return self.within if span <= self.per_node else self.between
