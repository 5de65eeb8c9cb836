"""Messages between pipeline stages: hidden states up, gradients down.

Each direction has a process group of its own, so that on a GPU a send in one never waits behind a receive in the other;
within a direction messages between two ranks keep their order, which schedules are checked for.
"""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megatron.parallel.mesh import Mesh

UP, DOWN = 0, 1


@dataclass
class PipelineLink:
    """Sends to and receives from the other pipeline ranks, none of which waits unless it is asked to."""

    mesh: Mesh
    groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]
    _sending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    @staticmethod
    def build(mesh: Mesh) -> "PipelineLink":
        """Every rank must call this, in the same order."""
        everyone = range(mesh.size("pp"))
        return PipelineLink(mesh, (mesh.subgroup("pp", everyone), mesh.subgroup("pp", everyone)))

    def send(self, tensor: Tensor, rank: int, direction: int) -> None:
        """Begin to send to a pipeline rank; the tensor is kept until it has gone."""
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.mesh.peer("pp", rank), group=self.groups[direction], tag=direction)
        self._sending.append((work, tensor))

    def receive(self, into: Tensor, rank: int, direction: int) -> dist.Work:
        """Begin to receive from a pipeline rank; `wait` on what is returned before `into` is used."""
        return dist.irecv(into, self.mesh.peer("pp", rank), group=self.groups[direction], tag=direction)

    def finish(self) -> None:
        """Wait until all has been sent."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
