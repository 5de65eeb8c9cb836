import pytest
import torch

from megatron.inference.request import SamplingParams
from megatron.inference.sampler import Sampler, keep_top_k, keep_top_p

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64))


def kept(logits: torch.Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


def shares(params: SamplingParams, logits: torch.Tensor, count: int = 4000) -> torch.Tensor:
    sampler = Sampler(params)
    draws = torch.tensor([sampler.draw(logits) for _ in range(count)])
    return torch.bincount(draws, minlength=len(logits)) / count


def test_greedy_draws_nothing() -> None:
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=1), SamplingParams(top_p=0.5)):
        assert Sampler(params).draw(LOGITS) is None


def test_top_k_keeps_the_k_largest_and_ties() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [1, 3]
    assert kept(keep_top_k(LOGITS, 5)) == kept(keep_top_k(LOGITS, 99)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_k(torch.tensor([1.0, 2.0, 2.0, 3.0]), 2)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.86, [1, 2, 3, 4]), (1.0, None)],
)
def test_top_p_keeps_the_token_that_crosses(p: float, expected: list[int] | None) -> None:
    assert kept(keep_top_p(LOGITS, p)) == (expected or [0, 1, 2, 3, 4])


def test_shares_follow_the_probabilities() -> None:
    torch.testing.assert_close(
        shares(SamplingParams(temperature=1.0), LOGITS), LOGITS.exp().float(), rtol=0, atol=0.025
    )
    cold = (LOGITS / 0.5).softmax(-1).float()
    torch.testing.assert_close(shares(SamplingParams(temperature=0.5), LOGITS), cold, rtol=0, atol=0.025)
    two = shares(SamplingParams(temperature=1.0, top_k=2), LOGITS)
    torch.testing.assert_close(two, torch.tensor([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), rtol=0, atol=0.025)
    nucleus = shares(SamplingParams(temperature=1.0, top_p=0.5), LOGITS)
    assert nucleus.nonzero().flatten().tolist() == [1, 3]


def test_ids_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((50,), -torch.inf)
    logits[[3, 20]] = 0.0
    assert shares(SamplingParams(temperature=1.0), logits, 500).nonzero().flatten().tolist() == [3, 20]


@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 100.0])
def test_extreme_temperatures_stay_in_range(temperature: float) -> None:
    drawn = shares(SamplingParams(temperature=temperature), LOGITS.float(), 200)
    assert drawn.sum() == 1
    assert temperature > 1 or drawn[1] == 1


def test_streams_are_independent_of_the_global_one() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [Sampler(params).draw(LOGITS) for _ in range(3)]
    torch.manual_seed(1)
    assert [Sampler(params).draw(LOGITS) for _ in range(3)] == first
    torch.manual_seed(0)
    Sampler(params).draw(LOGITS)
    assert torch.equal(torch.get_rng_state(), state)
