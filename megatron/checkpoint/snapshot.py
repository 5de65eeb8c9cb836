"""A copy of a run's tensors in CPU memory, for a save that goes on while the run does."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.parallel.backend import Backend


class Snapshot:
    """Buffers for one copy of the tensors it is made for: all the memory that asynchronous saves ever take.

    The pages are touched (on CUDA: pinned) at once, so that a lack of memory shows before the first step and the
    first copy is as fast as later ones. Raises ConfigError where the memory isn't there.
    """

    def __init__(self, tensors: Mapping[str, Tensor], backend: Backend) -> None:
        self._backend = backend
        try:
            self._buffers = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=backend.is_cuda).zero_()
                for name, tensor in tensors.items()
            }
        except RuntimeError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise ConfigError(
                f"--async-save holds a copy of the state in CPU memory, {size / 1e9:.1f} GB here, which can't be had "
                f"({error}); leave it out"
            ) from error

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors as they are now; what the last call returned is overwritten. Same names as at first."""
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        self._backend.synchronize()
        return {name: self._buffers[name] for name in tensors}
