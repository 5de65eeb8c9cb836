"""What a check of a cluster tries and how it judges what it finds."""

import math
from collections import Counter

import pytest

from megatron.parallel.measure import Rate, groupings, node_size
from megatron.train.cluster import (
    ClusterReport,
    Tried,
    by_operation,
    disagreements,
    slow_groups,
    slow_places,
    slow_ranks,
    wrong_layouts,
)
from megatron.train.selfcheck import Layout, layouts, toy_config

TWO_MACHINES = ["a"] * 4 + ["b"] * 4


def report(**changes: object) -> ClusterReport:
    values = dict(world_size=4, hosts=["a", "a", "b", "b"], ranks_per_machine=2, backend="gloo", device="CPU",
                  dtype="float32", torch="2", tolerance=1e-4)  # fmt: skip
    return ClusterReport(**(values | changes))


def test_machines_may_differ_in_size() -> None:
    assert [node_size(hosts) for hosts in (["a"], ["a"] * 6, TWO_MACHINES, ["a"] * 4 + ["b"] * 2)] == [1, 6, 4, 2]


def test_groups_stand_for_what_layouts_use() -> None:
    found = {name: grouping.groups for grouping in groupings(TWO_MACHINES) for name in grouping.names}
    assert found["tp=4"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found["pp neighbours, 1 apart, odd"] == ((1, 2), (3, 4), (5, 6))
    assert found["pp neighbours, 4 apart, even"] == found["dp across machines"] == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found["all ranks"] == (tuple(range(8)),)
    for groups in found.values():
        assert max(Counter(rank for group in groups for rank in group).values()) == 1


def test_one_rank_has_no_links() -> None:
    assert groupings(["a"]) == []


@pytest.mark.parametrize(("world", "node"), [(1, 1), (2, 2), (4, 2), (6, 3), (6, 6), (8, 8), (12, 4), (24, 8), (64, 8)])
def test_every_layout_can_be_built_from_flags(world: int, node: int) -> None:
    found = layouts(world, node)
    assert len(set(found)) == len(found)
    for layout in found:
        parallel = toy_config(world, node, layout).parallel  # raises where something doesn't divide
        assert parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * layout.dp == world
        assert layout.tp <= node


def test_the_first_layouts_cover_sizes_and_schedules() -> None:
    found = layouts(8, 8)
    sizes = {(layout.tp, layout.pp) for layout in found}
    first = found[: len(sizes)]
    assert {(layout.tp, layout.pp) for layout in first} == sizes and len(found) == 64
    assert {layout.schedule for layout in first} == {"1f1b", "gpipe", "interleaved", "zb-h1"}
    assert all(layout.sharded == (layout.dp > 1) and layout.sequence == (layout.tp > 1) for layout in first)


def test_slow_is_a_fifth_below_the_median() -> None:
    assert slow_places([10.0, 9.0, 7.9, 10.0]) == [2]
    assert slow_places([10.0, 7.0]) == [1]
    assert slow_places([5.0]) == slow_places([10.0, 8.1, 9.0]) == []


def test_slow_ranks_and_groups_are_named_with_their_machines() -> None:
    ranks = [{"flops_per_second": rate, "memory_bytes_per_second": 1.0} for rate in (4.0, 4.0, 4.0, 2.0)]
    assert list(slow_ranks(report(ranks=ranks))) == ["rank 3 (b) is slow: matrix products at 50% of the median"]
    seen = [((0, 1), {"all_reduce": Rate(rate, 0.1)}) for rate in (4.0, 3.0)]
    seen += [((2, 3), {"all_reduce": Rate(rate, 0.1)}) for rate in (9.0, 8.0)]
    links = list(by_operation(("tp=2",), seen))
    assert links[0].slowest.ranks == (0, 1) and links[0].slowest.bytes_per_second == 3.0  # as its slowest rank saw it
    assert list(slow_groups(report(links=links))) == ["ranks 0, 1 (a): all_reduce of tp=2 at 38% of the median group"]


def test_a_rank_that_computes_otherwise_alone_is_named() -> None:
    good = {"gradient norm": 2.0, "gradient of x": 1.0, "gradient of zero": 1e-9}
    noisy = good | {"gradient of zero": 5e-9, "gradient norm": 2.0 + 1e-6}
    assert list(disagreements(report(), [good, noisy, good, good])) == []
    (said,) = disagreements(report(), [good, noisy, good, good | {"gradient of x": 1.1}])
    assert said.startswith("rank 3 (b) computes another step alone") and "gradient of x is off by 1.0e-01" in said
    assert len(list(disagreements(report(), [good, good, good, good | {"gradient of x": math.nan}]))) == 1


def test_a_wrong_layout_is_named_and_kept_as_json() -> None:
    found = report(layouts=[Tried("tp=2", 1, "gradient of x", 1e-6), Tried("pp=2", 2, "gradient of y", math.inf)])
    assert list(wrong_layouts(found)) == ["a step with pp=2 is wrong: gradient of y is off by inf on rank 2 (b)"]
    assert [tried["error"] for tried in found.as_json()["layouts"]] == [1e-6, None]


def test_layouts_are_described_as_they_differ() -> None:
    assert len({layout.describe() for layout in layouts(8, 8)}) == 64
    assert Layout(tp=2, sequence=True).describe() == "tp=2 pp=1 dp=1, sequence parallel"
