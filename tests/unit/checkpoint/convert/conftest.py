"""A Hugging Face directory, whole and to be damaged."""

from pathlib import Path

import pytest

from megatron.checkpoint.convert.hf_export import write_hf
from tests.unit.checkpoint.convert.sources import source


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with exits in several files."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    write_hf(source(), directory, max_shard_bytes=40_000)
    return directory


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in exported.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory
