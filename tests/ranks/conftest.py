"""One pool of rank processes for all tests of a session, and a place for whole runs."""

from collections.abc import Iterator

import pytest

from megatron.testing.ranks import Ranks
from tests.ranks.launcher import Launcher


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Up to eight gloo ranks."""
    pool = Ranks(8)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Runs by torchrun, in a directory of the module's own."""
    return Launcher(tmp_path_factory.mktemp("runs"))
