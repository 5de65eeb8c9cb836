"""Random streams follow from their names alone: same name, same numbers, whatever was drawn before."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.parallel.rng import DropoutStream, derive_seed, generator

KEYS = st.lists(st.one_of(st.integers(0, 2**40), st.text("abc0123456789", min_size=1, max_size=6)), max_size=4)


@given(seed=st.integers(0, 2**63), keys=KEYS)
def test_seeds_are_63_bits_and_reproducible(seed, keys):
    value = derive_seed(seed, *keys)
    assert 0 <= value < 2**63
    assert value == derive_seed(seed, *keys)


@given(left=KEYS, right=KEYS, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_other_names_give_other_seeds(left, right, seeds):
    names = [[str(word) for word in (seed, *keys)] for seed, keys in zip(seeds, (left, right), strict=True)]
    same = derive_seed(seeds[0], *left) == derive_seed(seeds[1], *right)
    assert same is (names[0] == names[1])


def test_neighbouring_streams_do_not_collide():
    """Steps, microbatches and layers of a long run: 40,000 streams, all different."""
    seeds = {
        derive_seed(1234, "dropout", step, m, layer) for step in range(100) for m in range(20) for layer in range(20)
    }
    assert len(seeds) == 100 * 20 * 20


def test_seeds_do_not_depend_on_the_process():
    """Python salts its own hashes per process; a resumed run must draw the same numbers."""
    code = "from megatron.parallel.rng import derive_seed; print(derive_seed(1234, 'dropout', 7))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(1234, "dropout", 7)


RECORDED = (7608735672164080697, 1070305762619254470)


def test_recorded_values():
    """A change here changes every run's initial values and dropout: resumed runs would no longer be exact."""
    assert derive_seed(1234) == RECORDED[0]
    assert derive_seed(1234, "dropout", 0, 0, 0, 3) == RECORDED[1]


def test_generators_start_their_stream_anew():
    first = torch.rand(5, generator=generator(1, "embedding"))
    torch.rand(100)
    assert torch.equal(first, torch.rand(5, generator=generator(1, "embedding")))
    assert not torch.equal(first, torch.rand(5, generator=generator(2, "embedding")))


def dropped(stream: DropoutStream, place: int | str) -> torch.Tensor:
    stream.enter(place)
    return torch.nn.functional.dropout(torch.ones(1000), 0.5)


def test_dropout_is_the_same_in_any_order():
    """A recomputed forward enters layers again, and after others: it must drop the same."""
    stream = DropoutStream(1234, step=3, microbatch=1)
    forward = {place: dropped(stream, place) for place in (0, 1, "exit 2")}
    again = {place: dropped(stream, place) for place in ("exit 2", 1, 0)}
    assert all(torch.equal(forward[place], again[place]) for place in forward)
    assert not torch.equal(forward[0], forward[1])


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 4}, {"microbatch": 0}])
def test_dropout_differs_by_every_part_of_its_name(change):
    name = {"seed": 1, "step": 3, "microbatch": 1}
    assert not torch.equal(dropped(DropoutStream(**name), 0), dropped(DropoutStream(**{**name, **change}), 0))
