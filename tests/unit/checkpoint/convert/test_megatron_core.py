"""Checkpoints that are recognised in order to say what helps."""

from pathlib import Path

import pytest

from megatron.checkpoint.convert.megatron_core import refuse_megatron_core
from megatron.errors import CheckpointError


def test_distributed_checkpoints_of_megatron_core_are_named(exported: Path, tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000010"
    iteration.mkdir()
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (iteration / "common.pt").write_bytes(b"")
    for root in (tmp_path, iteration):
        with pytest.raises(
            CheckpointError, match="iter_0000010 is a distributed checkpoint of Megatron-core"
        ) as caught:
            refuse_megatron_core(root)
        assert "export_ckpt" in str(caught.value) and "\n" not in str(caught.value)
    for other in (exported, tmp_path / "nothing"):
        refuse_megatron_core(other)  # raises nothing
    (iteration / "metadata.json").write_text("no JSON")
    refuse_megatron_core(tmp_path)
