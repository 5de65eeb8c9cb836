"""Messages between pipeline stages: hidden states up, gradients down.

Each pair of ranks has a process group for each way and direction: on a GPU a group runs its messages one after another,
so that a receive posted early would hold up a send of the same group. Messages of a group keep their order, which
schedules are checked for.
"""

from collections import deque
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megatron.parallel.mesh import Mesh

UP, DOWN = 0, 1
_MOST_SENDING = 4  # messages under way at a time


@dataclass
class PipelineLink:
    """Sends to and receives from the other pipeline ranks, none of which waits unless it is asked to.

    groups: by (sending rank, receiving rank, direction), those of this rank.
    """

    mesh: Mesh
    groups: dict[tuple[int, int, int], dist.ProcessGroup]
    _sending: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)

    @staticmethod
    def build(mesh: Mesh) -> "PipelineLink":
        """Links each rank with the next and the last with the first. Every rank must call this, in the same order."""
        size, groups = mesh.size("pp"), {}
        for rank in range(size):
            following = (rank + 1) % size
            for sender, receiver, direction in ((rank, following, UP), (following, rank, DOWN)):
                group = mesh.subgroup("pp", sorted((sender, receiver)))
                if group is not None:
                    groups[sender, receiver, direction] = group
        return PipelineLink(mesh, groups)

    def send(self, tensor: Tensor, rank: int, direction: int) -> None:
        """Begin to send to a pipeline rank; the tensor is kept until it has gone.

        Waits for an earlier message where several are under way; gloo's are so until they are waited for. Schedules
        are checked to come to their end even if every send waited for its receive.
        """
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        while len(self._sending) >= _MOST_SENDING:
            self._sending.popleft()[0].wait()
        tensor, group = tensor.contiguous(), self.groups[self.mesh.rank("pp"), rank, direction]
        self._sending.append((dist.isend(tensor, self.mesh.peer("pp", rank), group=group), tensor))

    def receive(self, into: Tensor, rank: int, direction: int) -> dist.Work:
        """Begin to receive from a pipeline rank; `wait` on what is returned before `into` is used."""
        group = self.groups[rank, self.mesh.rank("pp"), direction]
        return dist.irecv(into, self.mesh.peer("pp", rank), group=group)

    def finish(self) -> None:
        """Wait until all has been sent."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
