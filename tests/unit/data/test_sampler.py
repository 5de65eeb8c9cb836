"""Batches are functions of (seed, consumed samples): seen once a pass, the same after any resume."""

from dataclasses import replace
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.sampler import BatchOrder, microbatches
from megatron.errors import ConfigError

sizes = st.integers(1, 300)
micro_sizes = st.integers(1, 7)
dp_sizes = st.integers(1, 5)
seeds = st.integers(0, 2**32)
TIERS = [pytest.param(100, id="quick"), pytest.param(1000, id="full", marks=pytest.mark.slow)]


def tiers(**strategies: st.SearchStrategy):
    """A property test, with 100 examples in the quick tier and 1,000 in the slow one."""

    def decorate(property_holds):
        @pytest.mark.parametrize("examples", TIERS)
        def test(examples: int) -> None:
            settings(max_examples=examples, deadline=None, database=None)(given(**strategies)(property_holds))()

        return test

    return decorate


def ranks(order: BatchOrder) -> list[BatchOrder]:
    return [replace(order, dp_rank=rank) for rank in range(order.dp_size)]


def global_batches(num_samples: int, order: BatchOrder, count: int | None = None) -> list[list[int]]:
    """The samples of all ranks together, one list per microbatch step."""
    per_rank = [list(islice(microbatches(num_samples, rank), count)) for rank in ranks(order)]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks have unequal numbers of microbatches"
    return [list(chain.from_iterable(step)) for step in zip(*per_rank, strict=True)]


def test_single_by_hand() -> None:
    order = BatchOrder(2, consumed_samples=4, dp_rank=1, dp_size=2)
    assert list(microbatches(17, order)) == [[6, 7], [10, 11], [14, 15]]
    assert list(microbatches(16, order)) == [[6, 7], [10, 11], [14, 15]]
    assert list(microbatches(15, order)) == [[6, 7], [10, 11]]
    assert list(microbatches(4, order)) == []


def check_single_once(size: int, micro: int, dp: int, consumed: int) -> None:
    seen = list(chain.from_iterable(global_batches(size, BatchOrder(micro, consumed, dp_size=dp))))
    group = micro * dp
    assert seen == list(range(consumed, consumed + max(size - consumed, 0) // group * group))


def check_single_resume(size: int, dp: int, plan: list[tuple[int, int]]) -> None:
    """Stops and changes of the micro-batch size change nothing about which sample comes when."""
    consumed, seen = 0, []
    for micro, steps in plan:
        batches = global_batches(size, BatchOrder(micro, consumed, dp_size=dp), steps)
        seen += list(chain.from_iterable(batches))
        consumed = len(seen)
    assert seen == list(range(consumed))


def check_cyclic_once(size: int, micro: int, dp: int, seed: int, sharding: bool) -> None:
    """In every pass each sample is seen once; shards leave out the remainder of the division."""
    order = BatchOrder(micro, 0, dp_size=dp, dataloader_type="cyclic", seed=seed, data_sharding=sharding)
    usable = size // dp * dp if sharding else size
    if not usable:
        return
    steps = -(-3 * usable // (micro * dp))
    per_rank = [list(chain.from_iterable(islice(microbatches(size, rank), steps))) for rank in ranks(order)]
    for number in range(2):
        if sharding:
            shard = usable // dp
            parts = [sorted(seen[number * shard : (number + 1) * shard]) for seen in per_rank]
            assert list(chain.from_iterable(parts)) == list(range(usable))
        else:
            stream = list(chain.from_iterable(global_batches(size, order, steps)))
            assert sorted(stream[number * size : (number + 1) * size]) == list(range(size))


def check_cyclic_resume(size: int, micro: int, dp: int, seed: int, sharding: bool, stop: int) -> None:
    order = BatchOrder(micro, 0, dp_size=dp, dataloader_type="cyclic", seed=seed, data_sharding=sharding)
    if sharding and size < dp:
        return
    for rank in ranks(order):
        straight = list(islice(microbatches(size, rank), stop + 5))
        resumed = replace(rank, consumed_samples=stop * micro * dp)
        assert list(islice(microbatches(size, resumed), 5)) == straight[stop:]


def check_cyclic_is_one_stream(size: int, plan: list[tuple[int, int]], seed: int) -> None:
    """Without shards, sample p of the run does not depend on batch sizes or ranks at all."""
    kind = {"dataloader_type": "cyclic", "seed": seed, "data_sharding": False}
    seen: list[int] = []
    for micro, dp in plan:
        seen += chain.from_iterable(global_batches(size, BatchOrder(micro, len(seen), dp_size=dp, **kind), 3))
    straight = islice(microbatches(size, BatchOrder(1, **kind)), len(seen))
    assert seen == list(chain.from_iterable(straight))


def check_seed_decides(size: int, seed: int, step: int) -> None:
    def batch(seed: int) -> list[int]:
        order = BatchOrder(size, step * size, dataloader_type="cyclic", seed=seed)
        return next(microbatches(size, order))

    assert batch(seed) == batch(seed)
    assert batch(seed + 1) == next(
        microbatches(size, BatchOrder(size, (step + 1) * size, dataloader_type="cyclic", seed=seed))
    )


test_single_sees_each_sample_once = tiers(size=sizes, micro=micro_sizes, dp=dp_sizes, consumed=st.integers(0, 320))(
    check_single_once
)
test_single_resumes_anywhere = tiers(
    size=sizes, dp=dp_sizes, plan=st.lists(st.tuples(micro_sizes, st.integers(0, 6)), max_size=5)
)(check_single_resume)
test_cyclic_sees_each_sample_once = tiers(
    size=sizes, micro=micro_sizes, dp=dp_sizes, seed=seeds, sharding=st.booleans()
)(check_cyclic_once)
test_cyclic_resumes_anywhere = tiers(
    size=sizes, micro=micro_sizes, dp=dp_sizes, seed=seeds, sharding=st.booleans(), stop=st.integers(0, 60)
)(check_cyclic_resume)
test_cyclic_without_shards_is_one_stream = tiers(
    size=sizes, plan=st.lists(st.tuples(micro_sizes, dp_sizes), max_size=4), seed=seeds
)(check_cyclic_is_one_stream)
test_seed_and_step_decide = tiers(size=sizes, seed=seeds, step=st.integers(0, 5))(check_seed_decides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch_size": 0}, "--micro-batch-size 0"),
        ({"consumed_samples": -1}, "-1 consumed"),
        ({"dp_rank": 2, "dp_size": 2}, "rank 2 of 2"),
        ({"dataloader_type": "random"}, "--dataloader-type random"),
        ({"dataloader_type": "cyclic", "dp_size": 2, "consumed_samples": 3}, "not a multiple of dp=2"),
    ],
)
def test_senseless_orders(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchOrder(**{"micro_batch_size": 1, **fields})


def test_more_ranks_than_samples() -> None:
    with pytest.raises(ConfigError, match="--no-data-sharding"):
        next(microbatches(3, BatchOrder(1, dp_size=4, dataloader_type="cyclic")))
