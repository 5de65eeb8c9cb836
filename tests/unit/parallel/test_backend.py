"""Which device a run gets, and what it can be asked; GPUs are imitated, so that this runs anywhere."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.errors import ConfigError
from megatron.parallel.backend import Backend

ROOT = Path(__file__).resolve().parents[3]
CPU = Backend(torch.device("cpu"), "gloo")
GPU = Backend(torch.device("cuda"), "nccl")


@pytest.fixture
def gpu(monkeypatch):
    """Let torch say that there is a GPU, and which."""

    def pretend(name: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return pretend


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        (None, None, CPU),
        (None, "gloo", CPU),
        ("NVIDIA H200", None, GPU),
        ("NVIDIA H200", "nccl", GPU),
        ("NVIDIA H200", "gloo", CPU),  # the way to stay on the CPU of a machine with a GPU
    ],
)
def test_choice(gpu, name, asked, expected):
    gpu(name)
    assert Backend.choose(asked) == expected


def test_nccl_without_a_gpu_is_refused(gpu):
    gpu(None)
    with pytest.raises(ConfigError, match="--distributed-backend nccl needs a GPU"):
        Backend.choose("nccl")


@pytest.mark.parametrize(("visible", "expected"), [(4, "cuda:2"), (1, "cuda:0")])
def test_each_process_of_a_machine_takes_its_gpu(gpu, monkeypatch, visible: int, expected: str):
    """Or the only one, where each process is shown but its own."""
    gpu("NVIDIA H200")
    made_current = []
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert str(Backend.choose().device) == expected
    assert made_current == [torch.device(expected)]


def test_more_processes_than_gpus_are_refused(gpu, monkeypatch):
    gpu("NVIDIA H200")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU, 2 are visible: start 2 processes"):
        Backend.choose()


def test_a_cpu_has_nothing_to_wait_for():
    assert not CPU.is_cuda
    CPU.synchronize()
    assert CPU.name().startswith("CPU (")


def test_peak_memory_is_in_bytes():
    """At least what this process holds, and no thousand times as much: units differ between Linux and macOS."""
    block = torch.ones(2**24)  # 64 MiB
    peak = CPU.peak_memory_bytes()
    assert 2**26 <= peak < 2**42
    if sys.platform == "linux":
        assert peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1)
    assert block.numel() == 2**24


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312e12),
        ("NVIDIA H200", torch.float32, None),  # TF32 or not: not known from here
        ("Some other GPU", torch.bfloat16, None),
    ],
)
def test_peak_flops_where_known(gpu, name, dtype, expected):
    gpu(name)
    assert GPU.peak_flops(dtype) == expected


def test_peak_flops_of_a_cpu_are_not_known():
    assert CPU.peak_flops(torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_its_figures():
    held = torch.ones(2**20, device="cuda")
    GPU.synchronize()
    assert GPU.peak_memory_bytes() >= held.nbytes
    assert GPU.name()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_not_the_parents():
    """Linux hands ru_maxrss down to children; a large parent must not hide a small child's own peak."""
    large = bytearray(800_000_000)
    command = "from megatron.parallel.backend import peak_resident_bytes as peak; print(peak())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < len(large)


def test_one_hardware_queue_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = Backend(torch.device("cuda", 0), "nccl"), Backend(torch.device("cpu"), "gloo")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert not gpu.has_one_queue
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert gpu.has_one_queue
    assert not cpu.has_one_queue
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert not gpu.has_one_queue
