"""Who is gone is found within seconds, and by all alike; who waits for one that is gone is told."""

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from megatron.errors import RankLostError
from megatron.parallel.presence import Presence

MINUTE = timedelta(minutes=1)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, 1, True)


@pytest.fixture
def three(server: TCPStore) -> Iterator[list[Presence]]:
    present = [Presence(PrefixStore("run", server), rank, 3, MINUTE) for rank in range(3)]
    yield present
    for one in present:
        one.leave()


def test_nobody_is_missing_while_all_count(three: list[Presence]) -> None:
    assert three[0].missing() == []
    assert three[1].lost() == []


def test_who_left_is_missing_and_the_first_to_ask_decides(three: list[Presence]) -> None:
    three[2].leave()
    began = time.monotonic()
    assert three[1].lost() == [2]
    assert time.monotonic() - began < 4
    three[1].leave()  # as a survivor does
    began = time.monotonic()
    assert three[0].lost() == [2]
    assert time.monotonic() - began < 1
    assert three[0].missing() == [1, 2]


def test_waiting_for_one_that_is_gone_ends(three: list[Presence]) -> None:
    three[2].leave()
    with pytest.raises(RankLostError, match="rank 0 waits in vain for rank 2, which ended before training began"):
        three[0].meet()


def test_waiting_for_one_that_is_slow_ends_in_time(server: TCPStore) -> None:
    slow = [Presence(server, rank, 2, timedelta(seconds=0.2)) for rank in range(2)]
    with pytest.raises(RankLostError, match="--distributed-timeout-minutes"):
        slow[0].meet()
    for one in slow:
        one.leave()
