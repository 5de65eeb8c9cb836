"""One pool of rank processes for all tests of a session."""

from collections.abc import Iterator

import pytest

from megatron.testing.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Up to eight gloo ranks."""
    pool = Ranks(8)
    yield pool
    pool.close()
