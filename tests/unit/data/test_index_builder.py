"""The compiled and the numpy index builder give identical arrays; the package works without the compiled one."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import index_builder

ROOT = Path(__file__).parents[3]
MODULE = "megatron.data._index_builder"


def build_extension(target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", target / "lib", "--build-temp", target / "tmp"]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    pytest.importorskip("pybind11", reason="pybind11 is not installed: the extension cannot be built")
    pytest.importorskip("setuptools", reason="setuptools is not installed: the extension cannot be built")
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("c++")):
        pytest.skip(f"no C++ compiler ({compiler}): the extension cannot be built")
    target = tmp_path_factory.mktemp("extension")
    # -O0 compiles faster; no level may fuse or reorder the arithmetic, so all give the same arrays.
    outcome = build_extension(target, CFLAGS="-O0", CXXFLAGS="-O0")
    found = list(target.glob("lib/megatron/data/_index_builder*"))
    if not found and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python.h is not installed: the extension cannot be built")
    assert found, outcome.stderr
    specification = importlib.util.spec_from_file_location("_index_builder", found[0])
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def same(left: np.ndarray, right: np.ndarray) -> None:
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def slow_sample_index(lengths: np.ndarray, doc_idx: np.ndarray, seq_length: int, num_samples: int) -> list[list[int]]:
    """Token by token: where in the documents each sample starts."""
    places = [[position, offset] for position, d in enumerate(doc_idx) for offset in range(lengths[d])]
    return [[0, 0]] + [places[i * seq_length] for i in range(1, num_samples + 1)]


corpora = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(corpora, st.integers(1, 12), st.integers(1, 3), st.randoms(use_true_random=False))
def test_sample_index(lengths: list[int], seq_length: int, epochs: int, random) -> None:
    order = list(range(len(lengths))) * epochs
    random.shuffle(order)
    arrays = np.array(lengths, np.int32), np.array(order, np.int32)
    num_samples = (epochs * sum(lengths) - 1) // seq_length
    index = index_builder.numpy_sample_index(*arrays, seq_length, num_samples)
    assert index.tolist() == slow_sample_index(*arrays, seq_length, num_samples)
    with pytest.raises(ValueError, match="too few tokens"):
        index_builder.numpy_sample_index(*arrays, seq_length, num_samples + 1)


def test_compiled_sample_index_is_the_same(compiled: ModuleType) -> None:
    random = np.random.RandomState(0)
    for _ in range(200):
        lengths = random.randint(0, random.choice([2, 10, 500]), random.randint(1, 300)).astype(np.int32)
        lengths[0] += 1
        order = np.tile(np.arange(len(lengths), dtype=np.int32), random.randint(1, 4))
        random.shuffle(order)
        seq_length = int(random.randint(1, 100))
        num_samples = int(lengths[order].sum() - 1) // seq_length
        arguments = lengths, order, seq_length, num_samples
        same(compiled.sample_index(*arguments), index_builder.numpy_sample_index(*arguments))
        with pytest.raises(ValueError, match="too few tokens"):
            compiled.sample_index(lengths, order, seq_length, num_samples + 1)


@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [0.5, 0.5], [1 / 3] * 3, [0.1] * 10, [1e-9, 1 - 1e-9]])
def test_compiled_blend_is_the_same(compiled: ModuleType, weights: list[float]) -> None:
    for left, right in zip(
        compiled.blend(np.array(weights), 2000), index_builder.numpy_blend(np.array(weights), 2000), strict=True
    ):
        same(left, right)


def test_compiled_blend_is_the_same_for_random_weights(compiled: ModuleType) -> None:
    random = np.random.RandomState(1)
    for datasets in (2, 3, 15, 100):
        weights = random.rand(datasets)
        weights /= weights.sum()
        for left, right in zip(compiled.blend(weights, 3000), index_builder.numpy_blend(weights, 3000), strict=True):
            same(left, right)


def test_compiled_builder_refuses_other_arrays(compiled: ModuleType) -> None:
    with pytest.raises(TypeError):
        compiled.sample_index(np.ones(3), np.zeros(3, np.int32), 1, 1)
    with pytest.raises(IndexError):
        compiled.sample_index(np.ones(3, np.int32), np.array([0, 3], np.int32), 1, 1)
    with pytest.raises(ValueError, match="blend size"):
        compiled.blend(np.ones(0), 3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(0, 200))
def test_blend_keeps_its_shares(weights: list[float], size: int) -> None:
    shares = np.array(weights) / sum(weights)
    dataset, sample = index_builder.numpy_blend(shares, size)
    assert dataset.dtype == np.int16 and sample.dtype == np.int64
    counts = np.zeros(len(shares), int)
    for i in range(size):
        assert sample[i] == counts[dataset[i]]
        counts[dataset[i]] += 1
        assert np.all(counts <= shares * (i + 1) + 1 + 1e-9)


def test_compiled_one_is_used_where_it_is(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, compiled)
    index_builder.compiled_builder.cache_clear()
    assert index_builder.compiled_builder() is compiled
    misaligned = np.frombuffer(b"\0\0" + np.array([3, 4], np.int32).tobytes(), np.int32, offset=2)
    same(
        index_builder.build_sample_index(misaligned, np.array([1, 0]), 2, 3),
        np.array([[0, 0], [0, 2], [1, 0], [1, 2]], np.int32),
    )
    same(index_builder.build_blend(np.array([0.5, 0.5]), 4)[0], np.array([0, 1, 0, 1], np.int16))
    index_builder.compiled_builder.cache_clear()


def test_without_it_numpy_works_and_says_so_once(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # importing it now raises ImportError
    index_builder.compiled_builder.cache_clear()
    for _ in range(3):
        same(
            index_builder.build_sample_index(np.array([3, 4], np.int32), np.array([1, 0], np.int32), 2, 3),
            np.array([[0, 0], [0, 2], [1, 0], [1, 2]], np.int32),
        )
        same(index_builder.build_blend(np.array([0.5, 0.5]), 4)[0], np.array([0, 1, 0, 1], np.int16))
    assert [message for message in messages if "numpy" in message] == [messages[0]]
    index_builder.compiled_builder.cache_clear()


def test_install_survives_a_missing_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    outcome = build_extension(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert outcome.returncode == 0, outcome.stderr
    assert not list(tmp_path.glob("lib/megatron/data/_index_builder*"))
