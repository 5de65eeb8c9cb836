"""Key/value caches for decoding. A cache knows positions, not policies.

`LayerKV` holds one layer's rotated keys and its values for positions 0..length-1 and grows in place up to its
capacity. Layers (and exit blocks) of one sequence may stand at different lengths: a token that left early has no
keys and values in the deeper layers yet.
"""

import torch
from torch import Tensor


class LayerKV:
    """Keys and values of one layer: `[capacity, b, kv heads, head dim]` each, of which `length` are valid."""

    def __init__(self, capacity: int, shape: tuple[int, int, int], like: Tensor) -> None:
        self.keys = torch.empty((capacity, *shape), dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions [s, b, kv heads, head dim] and return all valid keys and values."""
        stop = self.length + keys.shape[0]
        assert stop <= self.keys.shape[0], "KV cache is full"
        self.keys[self.length : stop] = keys
        self.values[self.length : stop] = values
        self.length = stop
        return self.keys[:stop], self.values[:stop]
