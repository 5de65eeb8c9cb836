"""Where a rank's part of a tensor lies in the whole: what checkpoints and initial values are cut by."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Placed(NamedTuple):
    """A rank's part of a tensor: a view of it, the whole tensor's shape, and where in that it begins."""

    view: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @staticmethod
    def whole(tensor: Tensor) -> "Placed":
        """All of a tensor."""
        return Placed(tensor, tuple(tensor.shape), (0,) * tensor.dim())

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of the whole's shape."""
        for dim, (start, length) in enumerate(zip(self.offset, self.view.shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


def views(parts: Mapping[str, Placed]) -> dict[str, Tensor]:
    """The parts alone."""
    return {name: part.view for name, part in parts.items()}
