"""The gradient of a step with partial microbatches, by plain autograd and the formula alone.

A microbatch goes backward on a span of stages. With N_k the microbatches that go on to the last stage and have a
backward on stage k, f_k the others on it (fillers), and c = 1/N_0, the gradient of stage k's uses of its weights is

    sum over microbatches that reach the last stage   1/N_k sum_(j >= k) [ L_final + sum_exits w L / (1 + c f_j) ]
  + sum over fillers                                    c   sum_(j = k ... deepest)  sum_exits w L / (1 + c f_j)

where the exits are those on stage j. Each stage gets a copy of the whole model, so that what one stage's uses of a
tied matrix or norm bring is told apart from another's. Without partial microbatches this is the mean over all.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.exits.spec import FINAL
from megatron.model.gpt import GPT, Taps
from megatron.model.partition import StageSpec
from megatron.model.stage import TokenBatch
from megatron.nn.layer import LayerContext


class Span(NamedTuple):
    """The first and last stage on which a microbatch goes backward."""

    first: int
    last: int


def step_gradients(
    model: GPT,
    stages: Sequence[StageSpec],
    batches: Sequence[TokenBatch],
    spans: Sequence[Span],
    weights: Mapping[str, float],
    original: bool = False,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients by parameter name, and mean losses by head over the microbatches for which the head runs.

    model: all of it. weights: of the heads' losses. original: every loss weighs one over the microbatches that reach
    the last stage.
    """
    end = len(stages) - 1
    whole = [span.last == end for span in spans]
    complete = [
        sum(reach and span.first <= k for reach, span in zip(whole, spans, strict=True)) for k in range(end + 1)
    ]
    fillers = [
        sum(not reach and span.last >= k for reach, span in zip(whole, spans, strict=True)) for k in range(end + 1)
    ]
    c = 1 / complete[0]
    copies = [deepcopy(model) for _ in stages]
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    found: dict[str, list[Tensor]] = {}
    for batch, span, reach in zip(batches, spans, whole, strict=True):
        losses = _losses(copies, stages[: span.last + 1], batch)
        for k in range(span.first, span.last + 1):
            share = 1 / sum(whole) if original else 1 / complete[k] if reach else c
            total = torch.zeros((), dtype=torch.float64)
            for j in range(k, span.last + 1):
                for label, loss in losses[j].items():
                    less = 1.0 if original or label == FINAL else 1 / (1 + c * fillers[j])
                    total = total + weights[label] * share * less * loss
            _add_gradients(gradients, total, copies[k])
        for stage in stages[span.first : span.last + 1]:
            for label, loss in losses[stage.index].items():
                found.setdefault(label, []).append(loss.detach())
    return gradients, {label: float(sum(values) / len(values)) for label, values in found.items()}


def _add_gradients(gradients: dict[str, Tensor], total: Tensor, copy: GPT) -> None:
    names, parameters = zip(*copy.named_parameters(), strict=True)
    made = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    for name, gradient in zip(names, made, strict=True):
        if gradient is not None:
            gradients[name] += gradient


def _losses(copies: Sequence[GPT], stages: Sequence[StageSpec], batch: TokenBatch) -> list[dict[str, Tensor]]:
    """By stage, the mean cross-entropy of each head's unmasked tokens; stage k uses the weights of copy k."""
    hidden = copies[0].embedding(batch.tokens, batch.position_ids, None)
    losses = []
    for stage in stages:
        model = copies[stage.index]
        context = model.context(batch.tokens.shape[1], hidden, batch.document_ids)
        hidden, taps = _layers(model, stage, hidden, context)
        losses.append({label: _loss(model, label, taps, context, batch) for label in stage.heads})
    return losses


def _layers(model: GPT, stage: StageSpec, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Taps]:
    taps: Taps = {}
    for index in range(stage.first, stage.last):
        entering, out = hidden, model.layers[str(index)](hidden, context)
        hidden = out.hidden
        places = {"input": (entering,), "mlp": (out.mlp_residual, out.mlp_input), "output": (hidden,)}
        taps |= {spec.label: places[spec.tap] for spec in stage.exits if spec.layer == index}
    return hidden, taps | {FINAL: (hidden,)}


def _loss(model: GPT, label: str, taps: Taps, context: LayerContext, batch: TokenBatch) -> Tensor:
    logits = model.features(label, taps[label], context) @ model.output_weight(label).t()
    of_tokens = F.cross_entropy(logits.permute(1, 2, 0), batch.labels, reduction="none")
    return (of_tokens * batch.loss_mask).sum() / batch.loss_mask.sum()
