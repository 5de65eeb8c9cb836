"""Choosing a token from one head's logits: greedy, temperature, top-k, top-p (rules of EE-LLM's sampler)."""

import torch
from torch import Tensor

from megatron.inference.request import SamplingParams
from megatron.parallel.rng import generator

_BITS = 48  # of one draw: fine enough for any probability, and u * total < total holds in float64


class Sampler:
    """One request's choices. Its random stream is its own and lies on the CPU: the same on every device."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._stream = None if params.greedy else generator(params.seed, "sampling")

    def draw(self, logits: Tensor) -> int | None:
        """Choose an id from logits [vocabulary], at least fp32; None for the most probable one."""
        if self._stream is None:
            return None
        params = self._params
        if params.temperature != 1:
            logits = (logits - logits.max()) / params.temperature  # the largest stays finite
        if params.top_k:
            logits = keep_top_k(logits, params.top_k)
        elif params.top_p:
            logits = keep_top_p(logits, params.top_p)
        cumulative = logits.softmax(-1).double().cumsum(-1)
        share = torch.randint(1 << _BITS, (1,), generator=self._stream).to(logits.device).double() / (1 << _BITS)
        # right=True passes over ids of probability 0, whose cumulative sum equals their predecessor's
        return int(torch.searchsorted(cumulative, share * cumulative[-1:], right=True))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [vocabulary] with all below the k-th largest at -inf; ties with it stay."""
    if k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k).values[-1]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [vocabulary] with all at -inf before which, in falling order, more than `p` of the probability lies.

    The most probable id always stays.
    """
    falling, order = logits.sort(descending=True)
    drop = torch.zeros_like(falling, dtype=torch.bool)
    drop[1:] = falling.softmax(-1).cumsum(-1)[:-1] > p
    return logits.masked_fill(drop.scatter(0, order, drop), -torch.inf)
