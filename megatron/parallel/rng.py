"""Random streams derived from what they are for, so that there is no random state to carry or to save.

A stream is named by (seed, purpose, step, microbatch, layer, ...): a recomputed forward, a resumed run and any number
of pipeline stages or data-parallel ranks draw the same numbers; tensor-parallel ranks draw their own. torch's dropout
takes no generator, so the global one is reseeded before each use.
"""

import hashlib

import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed for the stream named by `keys` under `seed`."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """Return a CPU generator at the start of the stream named by `keys`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


class DropoutStream:
    """The dropout streams of one microbatch: `enter(layer)` starts the stream of a layer, block or head.

    microbatch: its number among those of all data-parallel ranks, so that any number of these draws the same.
    """

    def __init__(self, seed: int, step: int, microbatch: int, tp_rank: int = 0) -> None:
        self._keys = (seed, "dropout", step, microbatch)
        self._tp_rank = tp_rank

    def enter(self, place: int | str, sharded: bool = False) -> None:
        """Reseed torch's global generators (CPU and GPU) for `place`.

        sharded: tp ranks hold different parts of what is dropped there, and draw different numbers.
        """
        part = (f"tp {self._tp_rank}",) if sharded and self._tp_rank else ()
        torch.manual_seed(derive_seed(*self._keys, place, *part))
