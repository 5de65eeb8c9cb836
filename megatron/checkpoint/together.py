"""Ranks that write one checkpoint: what one of them does for all, and that they end alike."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.checkpoint import commit
from megatron.checkpoint.commit import Staged
from megatron.errors import EELLMError
from megatron.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Together:
    """The ranks of a group, whose first leads; without a group, one process. Every rank calls every method.

    group: of gloo, used for this alone, since a thread may save beside the run. size: ranks in it.
    """

    group: dist.ProcessGroup | None = None
    leads: bool = True
    size: int = 1

    @staticmethod
    def of(mesh: Mesh) -> "Together":
        """All ranks of a mesh, in a group of their own. Every rank must call this."""
        return Together(mesh.everyone(), mesh.is_main, mesh.world_size)

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returned on the leading rank, on all; or the error it raised there, on all."""
        if self.group is None:
            return work()
        outcome: list[Any] = [None, None]
        error: BaseException | None = None
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as caught:  # noqa: BLE001 - whatever it is, the others must not wait for ever
                if isinstance(caught, EELLMError):
                    caught.everywhere = True
                error, outcome[1] = caught, _portable(caught)
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def staged(self, final: Path) -> Iterator[Staged]:
        """`commit.staged` for all ranks at once: the leading one makes the directory and gives it its name.

        Raises StorageError on all ranks where committing fails on one. The block must end alike on all of them.
        """
        with ExitStack() as stack:
            begun: list[Staged] = []

            def begin() -> Path:
                begun.append(stack.enter_context(commit.staged(final)))
                return begun[0].path

            path = self.lead(begin)
            mine = begun[0] if begun else Staged(path)
            yield mine
            for described in self.gather({} if begun else mine.described):
                mine.described.update(described)
            self.lead(stack.close)


ALONE = Together()


def _portable(error: Exception) -> EELLMError | RuntimeError:
    """An error that other ranks can be sent: ours as it is, others by what they say."""
    return error if isinstance(error, EELLMError) else RuntimeError(f"{type(error).__name__}: {error}")
