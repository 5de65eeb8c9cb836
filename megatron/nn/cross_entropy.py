"""Linear + cross-entropy without its logits: loss and gradients of a vocabulary head, chunk by chunk.

The only loss path, for every exit and the final head, in training and evaluation. Logits exist for one chunk of
tokens at a time; sums are at least fp32; the gradient of the output matrix is added straight into its buffer, so
any number of heads that share a matrix share one buffer. Forward and backward happen in one pass, hence no autograd.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Largest number of logits held at once, per device: 64 MB of fp32 on CPU, where a chunk should also stay near the
# caches; 1 GB on a GPU, where a chunk must be large enough to fill it.
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the vocabulary this rank holds, and the group over which the rest lies."""

    start: int
    group: dist.ProcessGroup


@dataclass
class HeadLoss:
    """What one head made of one microbatch.

    loss: scalar, sum over tokens of weight x cross-entropy (x confidence with dynamic weighting).
    confidence: scalar, weighted sum of top probabilities; only with dynamic weighting.
    grad_hidden: [n, h], gradient of `grad_scale x loss`; only in training.
    argmax: [n] top token ids; only where asked for.
    """

    loss: Tensor
    confidence: Tensor | None = None
    grad_hidden: Tensor | None = None
    argmax: Tensor | None = None


@torch.no_grad()
def linear_cross_entropy(  # noqa: PLR0913 - one head's loss is described by all of these
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
    dynamic: bool = False,
    grad_weight: Tensor | None = None,
    grad_scale: float = 1.0,
    need_grad: bool = True,
    argmax_over: int = 0,
    shard: VocabShard | None = None,
    max_logits: int | None = None,
) -> HeadLoss:
    """Loss of `softmax(hidden @ weight^T / temperature)` against labels, and its gradients.

    hidden [n, h], weight [V, h], labels [n], token_weights [n] (loss mask / normaliser). With `dynamic`, each
    token's loss also counts by its own top probability, taken as a constant. `need_grad` returns `grad_hidden`
    and adds the matrix's gradient to `grad_weight` (if given: a frozen matrix has none), both times `grad_scale`.
    `argmax_over` asks for each row's top id among the first so many (padding rows are no predictions).
    `shard`: weight holds only part of the vocabulary; `grad_hidden` is then this rank's part of a sum.
    """
    n = hidden.shape[0]
    precise = torch.promote_types(torch.float32, hidden.dtype)
    result = HeadLoss(loss=hidden.new_zeros((), dtype=precise))
    if dynamic:
        result.confidence = hidden.new_zeros((), dtype=precise)
    if need_grad:
        result.grad_hidden = torch.empty_like(hidden)
    if argmax_over:
        result.argmax = torch.empty_like(labels)
    budget = max_logits or MAX_LOGITS.get(hidden.device.type, MAX_LOGITS["cpu"])
    rows = max(1, budget // weight.shape[0])
    product = None
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        logits = (hidden[part] @ weight.t()).to(precise)
        if temperature != 1.0:
            logits /= temperature
        counts = token_weights[part].to(precise)
        if argmax_over:
            result.argmax[part] = _argmax(logits, argmax_over, shard)
        exponentials, total, label_logit = _normalise(logits, labels[part], shard)
        if dynamic:
            confidence = total.reciprocal()  # the largest exponential is 1
            result.confidence += (confidence * counts).sum()
            counts = counts * confidence
        result.loss += ((total.log() - label_logit) * counts).sum()
        if need_grad:
            slope = _logit_gradient(exponentials, total, labels[part], counts * (grad_scale / temperature), shard)
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=result.grad_hidden[part])
            if grad_weight is not None:
                product = _accumulate(grad_weight, slope, hidden[part], product)
        logits = exponentials = slope = None  # or this chunk would be alive while the next is made
    return result


def _normalise(logits: Tensor, labels: Tensor, shard: VocabShard | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest), written over `logits` [n, V]; its sum over the whole vocabulary and the label's
    (logit - largest), each [n]."""
    top = logits.amax(dim=-1)
    if shard is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    logits.sub_(top[:, None])
    local, inside = _local_labels(labels, logits.shape[1], shard)
    label_logit = logits.gather(1, local[:, None]).squeeze(1)
    exponentials = logits.exp_()
    total = exponentials.sum(dim=-1)
    if shard is not None:
        sums = torch.stack((total, label_logit.where(inside, 0)))
        dist.all_reduce(sums, group=shard.group)
        total, label_logit = sums
    return exponentials, total, label_logit


def _local_labels(labels: Tensor, columns: int, shard: VocabShard | None) -> tuple[Tensor, Tensor | None]:
    """Labels as columns of this shard (0 where elsewhere), and whether they are in it (None: all are)."""
    if shard is None:
        return labels, None
    local = labels - shard.start
    inside = (local >= 0) & (local < columns)
    return local.where(inside, 0), inside


def _argmax(logits: Tensor, ids: int, shard: VocabShard | None) -> Tensor:
    """Which of the first `ids` ids has the largest logit of each row; the lowest on ties, across shards too."""
    if shard is None:
        return logits[:, :ids].argmax(dim=-1)
    padding = torch.arange(logits.shape[1], device=logits.device) + shard.start >= ids
    value, index = logits.masked_fill(padding, -torch.inf).max(dim=-1)
    best = value.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=shard.group)
    candidate = (index + shard.start).where(value == best, torch.iinfo(torch.int64).max)
    dist.all_reduce(candidate, op=dist.ReduceOp.MIN, group=shard.group)
    return candidate


def _logit_gradient(
    exponentials: Tensor, total: Tensor, labels: Tensor, scale: Tensor, shard: VocabShard | None
) -> Tensor:
    """scale x (softmax - one-hot label), written over `exponentials`."""
    slope = exponentials.mul_((scale / total)[:, None])
    local, inside = _local_labels(labels, slope.shape[1], shard)
    hit = scale if inside is None else scale * inside
    return slope.scatter_add_(1, local[:, None], -hit[:, None])


def _accumulate(grad_weight: Tensor, slope: Tensor, hidden: Tensor, product: Tensor | None) -> Tensor | None:
    """grad_weight += slope^T hidden. A 16-bit product is added to the fp32 buffer by way of `product`, made once."""
    if grad_weight.dtype == hidden.dtype:
        grad_weight.addmm_(slope.t(), hidden)
        return None
    if product is None:
        product = torch.empty(grad_weight.shape, dtype=hidden.dtype, device=hidden.device)
    torch.mm(slope.t(), hidden, out=product)
    grad_weight.add_(product)
    return product
