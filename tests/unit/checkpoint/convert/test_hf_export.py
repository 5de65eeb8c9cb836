"""Writing: models that no architecture has, and failures, which leave nothing."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron import faults
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.config.model import ExitConfig
from megatron.errors import CheckpointError, ConfigError, StorageError
from tests.unit.checkpoint.convert.sources import source

UNWRITABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms around zero": ("llama", {"apply_layernorm_1p": True}, "--apply-layernorm-1p"),
    "post-norm": ("gpt", {"apply_residual_connection_post_layernorm": True}, "--apply-residual-connection"),
    "relu": ("gpt", {"squared_relu": True}, "gpt2 comes nearest, but: an MLP with relu2"),
    "groups": ("gpt", {"group_query_attention": True}, "--num-query-groups 1"),
    "turning": ("llama", {"rotary_percent": 0.5}, "--rotary-percent 0.5"),
    "no positions": ("gpt", {"position_embedding_type": "none"}, "--position-embedding-type none"),
    "window and norms": ("llama", {"window_size": 4, "qk_layernorm": True, "add_qkv_bias": True}, "comes nearest"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_models_that_no_architecture_has(name: str, tmp_path: Path) -> None:
    family, changes, message = UNWRITABLE[name]
    with pytest.raises(ConfigError, match=message):
        write_hf(source(family, ExitConfig(), **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide_the_width(tmp_path: Path) -> None:
    """Llama's class refuses them, Mistral's does not."""
    ours = source(exits=ExitConfig(), num_attention_heads=6, kv_channels=8)
    write_hf(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"


def test_nothing_is_replaced(tmp_path: Path) -> None:
    """But an empty directory."""
    target = tmp_path / "out"
    target.mkdir()
    write_hf(source(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(StorageError, match="out exists and is not replaced"):
        write_hf(source("gpt"), target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file exists and is not replaced"):
        write_hf(source(), tmp_path / "file")


def test_a_failure_at_any_file_operation_leaves_nothing(tmp_path: Path) -> None:
    """A full disk, wherever it is met."""
    ours = source(exits=ExitConfig((2,), exit_norm="own"))
    with faults.armed() as passed:
        write_hf(ours, tmp_path / "counted", max_shard_bytes=60_000)
    points = list(passed)
    assert {"safetensors.open", "safetensors.write", "huggingface.json", "huggingface.copy"} <= set(points)
    for number in sorted({points.index(point) + 1 for point in points} | {len(points) // 2}):
        with faults.armed(f"@{number}:enospc"), pytest.raises(StorageError, match=r"cannot write .*out"):
            write_hf(ours, tmp_path / "out", max_shard_bytes=60_000)
        assert [path.name for path in tmp_path.iterdir()] == ["counted"], points[number - 1]


def test_leftovers_of_a_killed_conversion_are_swept(tmp_path: Path) -> None:
    """Those of this target; another conversion may be on its way beside it."""
    mine, other = (tmp_path / f"{name}.staging-{'0' * 32}" for name in ("out", "other"))
    for path in (mine, other):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    write_hf(source(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", other.name}


def test_a_source_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    ours = source()

    def read(name: str) -> Tensor:
        if name.startswith("layers.2"):
            raise CheckpointError(f"{name} cannot be read: {os.strerror(errno.EIO)}")
        return torch.zeros(ours.specs()[name].shape)

    ours.read = read
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_hf(ours, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
