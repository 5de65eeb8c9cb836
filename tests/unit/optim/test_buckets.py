"""Rows of buckets sorted by the rank that updates them, and back."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron.optim.buckets import Segments, flatten, make_buckets, own_rows, unflatten


@dataclass
class Line:
    """A data-parallel axis."""

    total: int

    def size(self, _axis: str) -> int:
        return self.total


def parameters(shapes: list[tuple[int, ...]]) -> dict[str, nn.Parameter]:
    made = {f"p{i}": nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    for parameter in made.values():
        parameter.main_grad = torch.randn(parameter.shape)
    return made


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([(1,), (4,), (7,), (12, 3), (5, 2), (64, 8), (8, 2, 3)]), min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from([1, 16, 100, 10_000]),
)
def test_each_row_travels_once_to_the_rank_that_updates_it(shapes, ranks: int, most: int) -> None:
    made, line = parameters(shapes), Line(ranks)
    received = {name: torch.full_like(p.main_grad, torch.nan) for name, p in made.items()}
    for bucket in make_buckets(made, made, sharded=True, most=most):
        grads = [made[name].main_grad for name in bucket.names]
        assert len(grads) == 1 or sum(grad.numel() for grad in grads) <= most
        segments = Segments(bucket, grads, line)
        whole = segments.gather_all()
        assert len(whole) == ranks * segments.length
        targets = Segments(bucket, [received[name] for name in bucket.names], line)
        for rank, piece in enumerate(whole.chunk(ranks)):
            assert torch.equal(piece, segments.gather(rank))
            targets.scatter(piece, rank)
        again = [torch.empty_like(grad) for grad in grads]
        for other, grad in zip(again, grads, strict=True):
            other.copy_(grad)
        Segments(bucket, again, line).scatter_all(whole)
        assert all(torch.equal(other, grad) for other, grad in zip(again, grads, strict=True))
    assert all(torch.equal(received[name], p.main_grad) for name, p in made.items())


def test_a_piece_holds_the_rows_that_its_rank_updates() -> None:
    (bucket,) = make_buckets(made := parameters([(6, 2), (3,)]), made, sharded=True)
    grads = [p.main_grad for p in made.values()]
    piece = Segments(bucket, grads, Line(3)).gather(1)
    assert torch.equal(piece, torch.cat([grads[0][2:4].flatten(), grads[1][1:2]]))
    assert own_rows(grads[0], Line(3), 1) == slice(2, 4)


def test_a_large_parameter_travels_in_parts_of_every_ranks_rows() -> None:
    buckets = make_buckets(made := parameters([(2,), (100, 10), (3,)]), made, sharded=True, most=300)
    assert [(bucket.names, bucket.part, bucket.parts) for bucket in buckets] == [
        (("p0",), 0, 1),
        *((("p1",), part, 4) for part in range(4)),
        (("p2",), 0, 1),
    ]
    lengths = [Segments(bucket, [made["p1"].main_grad], Line(4)).length for bucket in buckets[1:5]]
    assert max(lengths) <= 80


def test_types_do_not_mix() -> None:
    made = parameters([(2,), (3,)])
    made["p1"].main_grad = made["p1"].main_grad.double()
    assert len(make_buckets(made, made, sharded=False)) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_flattening_is_undone(count: int) -> None:
    tensors = [torch.randn(2, 3) for _ in range(count)]
    flat = flatten(tensors)
    expected = [2 * tensor for tensor in tensors]
    flat *= 2
    unflatten(flat, tensors)
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, expected, strict=True))
