"""The one place that knows the device: CPU or CUDA, its process-group backend, waiting, memory figures.

Everyone else gets a `Backend` value and asks it; nobody else calls `torch.cuda`.
"""

import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron.errors import ConfigError


def peak_resident_bytes() -> int:
    """Most memory this process has held resident.

    From /proc where there is one: Linux hands `ru_maxrss` down to children, so it may be the parent's peak.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _own_gpu() -> torch.device:
    """The GPU of this process, made current: by its place on the machine, unless it is shown one alone."""
    place, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if place is None:
        return torch.device("cuda")
    if int(place) >= count > 1:
        raise ConfigError(f"process {place} of this machine has no GPU, {count} are visible: start {count} processes")
    device = torch.device("cuda", int(place) if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Backend:
    """A device and the process-group backend that goes with it."""

    device: torch.device
    process_group: str

    @staticmethod
    def choose(process_group: str | None = None) -> "Backend":
        """Pick CUDA + nccl where there is a GPU, else CPU + gloo; `process_group` overrides the latter.

        Processes of torchrun take a GPU of their machine each. Raises ConfigError for nccl without a GPU, or with
        fewer GPUs than processes.
        """
        has_gpu = torch.cuda.is_available()
        if process_group == "nccl" and not has_gpu:
            raise ConfigError("--distributed-backend nccl needs a GPU, and none is visible; use gloo")
        on_gpu = has_gpu and process_group != "gloo"
        return Backend(_own_gpu() if on_gpu else torch.device("cpu"), "nccl" if on_gpu else "gloo")

    @property
    def is_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.device.type == "cuda"

    @property
    def has_one_queue(self) -> bool:
        """Whether the GPU starts all work in the order of its launch, whatever streams it is on."""
        return self.is_cuda and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"

    def synchronize(self) -> None:
        """Wait for queued device work; nothing to do on CPU."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def stamp(self) -> Any:
        """A point in time on the device: when the work queued so far is done."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two stamps; the device must be done with both (`synchronize`)."""
        return start.elapsed_time(end) / 1e3 if self.is_cuda else end - start

    def peak_memory_bytes(self) -> int:
        """Most memory used so far: allocated on the GPU, or resident in this process on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()

    def memory_bytes(self) -> int | None:
        """All of the GPU's memory; None on CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.is_cuda else None

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Vendor's dense peak in FLOP/s for matrix products in `dtype`, or None where it isn't known."""
        if not self.is_cuda or dtype not in (torch.bfloat16, torch.float16):
            return None
        name = torch.cuda.get_device_name(self.device)
        peaks = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "V100": 125e12}
        return next((peak for part, peak in peaks.items() if part in name), None)

    def name(self) -> str:
        """The device in words."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        count = torch.get_num_threads()
        return f"CPU ({count} thread{'s' if count != 1 else ''})"
