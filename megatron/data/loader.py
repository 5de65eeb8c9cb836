"""From samples to microbatches: collated token tensors, and the masks and positions that belong to them.

`build_loader` is the only place here that touches worker processes; `make_microbatch` is a pure function.
"""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Protocol

import numpy as np
import torch

from megatron.data.sampler import BatchOrder, microbatches
from megatron.errors import DataError

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class SampleSource(Protocol):
    """A map-style dataset of int64 [s + 1] arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass needs; b sequences of s tokens.

    tokens, labels: int64 [b, s]; labels[:, i] is the token after tokens[:, i].
    loss_mask: float32 [b, s], 1 where the prediction of labels counts.
    position_ids: int64 [b, s], or None for 0..s-1 in every row.
    document_ids: int64 [b, s], or None; where given, a token attends only to tokens with the same id.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None


def make_microbatch(
    text: torch.Tensor,
    eod: int,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
) -> Microbatch:
    """Cut samples `text` (int64 [b, s + 1]) into inputs and labels.

    An end-of-document token `eod` belongs to the document before it: positions restart and attention is cut
    right after it. `eod_mask_loss` drops the predictions made *from* an eod, that is of the next document's
    first token, as Megatron does.
    """
    tokens = text[:, :-1].contiguous()  # [b, s]
    labels = text[:, 1:].contiguous()
    ends = tokens == eod
    loss_mask = (~ends).float() if eod_mask_loss else torch.ones(tokens.shape, dtype=torch.float32, device=text.device)
    position_ids = document_ids = None
    if reset_position_ids:
        places = torch.arange(tokens.shape[1], device=text.device).expand_as(tokens)
        starts = _shift_right(torch.where(ends, places + 1, 0)).cummax(dim=1).values  # of the token's document
        position_ids = places - starts
    if reset_attention_mask:
        document_ids = _shift_right(ends.long()).cumsum(dim=1)
    return Microbatch(tokens, labels, loss_mask, position_ids, document_ids)


def _shift_right(values: torch.Tensor) -> torch.Tensor:
    """Column i becomes column i + 1; the first is 0."""
    return torch.nn.functional.pad(values, (1, 0))[:, :-1]


def build_loader(
    dataset: SampleSource, order: BatchOrder, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[torch.Tensor]:
    """Iterate this rank's microbatches as int64 [b, s + 1] tensors, from `order.consumed_samples` on.

    Args:
        dataset: samples of equal length.
        order: which samples, see `sampler.microbatches`.
        num_workers: reading processes, started at the first batch; 0 reads in this one. They change no number.
        pin_memory: page-locked tensors, for copies to a CUDA device only.

    Draws nothing from the global random state. A sample's DataError is raised here, when its batch is due.
    """
    loader: Iterable[torch.Tensor | DataError] = torch.utils.data.DataLoader(
        _ErrorsAsItems(dataset),  # type: ignore[arg-type]
        batch_sampler=microbatches(len(dataset), order),  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one, iter() would advance the global generator
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    others = set(multiprocessing.active_children())
    with _signals_held():
        batches = iter(loader)
    readers = set(multiprocessing.active_children()) - others
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads data died ({error}); --num-workers 0 reads without such processes"
        ) from error
    finally:
        _end(batches, readers)


def _end(batches: Iterator, readers: Iterable[BaseProcess]) -> None:
    """End the reading processes: asked by torch, which waits 5 seconds for each, then by force.

    One that is stuck in a read, with SIGTERM ignored, would keep this process from ending. To kill it earlier would
    make torch raise that it died.
    """
    if readers:
        try:
            batches._shutdown_workers()  # type: ignore[attr-defined]
        finally:
            for reader in readers:
                reader.kill()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait while reading processes start: those inherit that, so none meets one before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Schedulers signal the whole process group; the trainer still needs its data until the step border."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


class _ErrorsAsItems:
    """Hands errors on as items: raised in a worker, torch would bury the message in that process's traceback."""

    def __init__(self, dataset: SampleSource) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> np.ndarray | DataError:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(samples: Sequence[np.ndarray | DataError]) -> torch.Tensor | DataError:
    tokens = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        tokens.append(sample)
    return torch.from_numpy(np.stack(tokens))
