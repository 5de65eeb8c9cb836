"""The mesh of one process, and what is said where several don't fit."""

import pytest
import torch

from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import AXES, Mesh

CPU = Backend(torch.device("cpu"), "gloo")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_one_process_is_first_and_only_everywhere():
    mesh = Mesh.build(ParallelConfig(), CPU)
    assert [mesh.size(axis) for axis in AXES] == [1, 1, 1]
    assert [mesh.rank(axis) for axis in AXES] == [0, 0, 0]
    assert mesh.is_main
    assert mesh.backend is CPU


def test_one_process_of_torchrun_is_the_same(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Mesh.build(ParallelConfig(), CPU) == Mesh(CPU)


def test_sizes_must_divide_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    sizes = ParallelConfig(tensor_model_parallel_size=3)
    with pytest.raises(ConfigError, match=r"size 3 times .* 1 does not divide the 4 processes launched: start 3"):
        Mesh.build(sizes, CPU)


def test_an_environment_without_a_rank_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK expected, but not set: start them with torchrun"):
        Mesh.build(ParallelConfig(), CPU)


def test_coordinates_are_asked_by_axis():
    mesh = Mesh(CPU, sizes=(2, 3, 4), ranks=(1, 2, 3))
    assert {axis: (mesh.rank(axis), mesh.size(axis)) for axis in AXES} == {"pp": (1, 2), "dp": (2, 3), "tp": (3, 4)}
    assert not mesh.is_main


def test_an_unknown_axis_is_our_bug():
    with pytest.raises(ValueError):
        Mesh(CPU).size("cp")


def test_it_is_a_value():
    with pytest.raises(AttributeError):
        Mesh(CPU).sizes = (2, 1, 1)
    assert len({Mesh(CPU), Mesh(CPU)}) == 1
