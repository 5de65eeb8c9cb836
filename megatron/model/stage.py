"""One pipeline stage as the schedule sees it: F (forward), E (heads: loss and their backward), B (backward).

E runs a microbatch's exit heads forward and backward against detached taps, just before its B, so the logits and
graphs of the heads of waiting microbatches never exist together. B is one backward pass from the taps and the gradient
that the next stage sends. What crosses a border is the hidden state, and its gradient on the way back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.exits.loss import LossTerms, Objective, Share
from megatron.exits.spec import FINAL
from megatron.model.gpt import GPT, Taps
from megatron.model.partition import StageSpec
from megatron.nn.cross_entropy import HeadLoss, VocabShard, linear_cross_entropy
from megatron.nn.layer import LayerContext
from megatron.nn.linear import WeightGradients
from megatron.parallel.rng import DropoutStream
from megatron.parallel.tensor import TensorParallel


class TokenBatch(Protocol):
    """One microbatch on the device: each [b, s]; the last two are None unless documents are kept apart."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None
    document_ids: Tensor | None


@dataclass
class Activations:
    """What F leaves for E and B of the same microbatch.

    hidden: until it is taken. end: where B begins. taps: until E. received: the hidden state of the stage before, if
    any. What neither hidden nor taps hold any more is kept only as far as a backward pass needs it.
    """

    hidden: Tensor | None
    end: GradientEdge | None
    taps: Taps
    context: LayerContext
    received: Tensor | None = None

    def take_hidden(self) -> Tensor:
        """The stage's output, for the next stage; it isn't kept here."""
        hidden, self.hidden = self.hidden, None
        return hidden.detach()


@dataclass(frozen=True)
class HeadScore:
    """Sums over one batch's unmasked tokens for one head: cross-entropy, hits, agreement with the final head."""

    loss: Tensor
    correct: Tensor
    agree: Tensor


Gradients = list[tuple[GradientEdge, Tensor]]  # where in the graph, and what comes in there


class Stage:
    """A span of a `GPT` with the training and evaluation passes over it."""

    def __init__(
        self,
        model: GPT,
        vocab_size: int | None = None,
        spec: StageSpec | None = None,
        later: WeightGradients | None = None,
    ) -> None:
        """`vocab_size`: true ids, where the model's matrices are padded beyond them. `spec`: of a model's several
        stages, the one meant. `later`: where the model's layers keep gradients, for `backward_input`."""
        self.model, self.later = model, later
        self.spec = spec or model.stages[0]
        self.vocab_size = vocab_size or model.padded_vocab_size

    def forward(self, batch: TokenBatch, stream: DropoutStream | None, received: Tensor | None = None) -> Activations:
        """F: embed, or take the hidden state [s, b, h] of the stage before, and run the layers; keeps the taps."""
        model = self.model
        if received is None:
            entering = model.embedding(batch.tokens, batch.position_ids, stream)
        else:
            entering = received.requires_grad_(torch.is_grad_enabled())
        context = model.context(batch.tokens.shape[1], entering, batch.document_ids, stream)
        hidden, taps = model(entering, context, self.spec)
        return Activations(hidden, _edge(hidden), taps, context, received)

    def empty_message(self, batch: TokenBatch) -> Tensor:
        """Room for a hidden state, or its gradient, as it crosses a border: [s, b, h], under sequence parallelism this
        rank's positions."""
        b, s = batch.tokens.shape
        like = next(self.model.parameters())
        length = self.model.tp.share(s) if self.model.tp.sequence else s
        return like.new_empty(length, b, self.model.config.hidden_size)

    def backward_heads(
        self, activations: Activations, batch: TokenBatch, objective: Objective, share: Share
    ) -> tuple[LossTerms, Gradients]:
        """E: every head's loss, its gradients in the head's parameters, and (tap, gradient) pairs for B."""
        terms, gradients, tp = LossTerms(), [], self.model.tp
        labels = batch.labels.t().flatten()
        precise = torch.promote_types(torch.float32, next(self.model.parameters()).dtype)
        token_weights = objective.token_weights(batch.loss_mask.to(precise)).t().flatten()
        for label in self.spec.heads:
            taps = activations.taps.pop(label)
            leaves = tuple(tap.detach().requires_grad_(tap.requires_grad) for tap in taps)
            with torch.enable_grad():
                features = self.model.features(label, leaves, activations.context)
            weight = self.model.output_weight(label)
            head = linear_cross_entropy(
                tp.gather(features.detach()).flatten(0, 1),
                weight.detach(),
                labels,
                token_weights,
                shard=vocab_shard(weight, tp),
                temperature=objective.temperatures.get(label, 1.0),
                dynamic=label in objective.dynamic,
                grad_weight=weight.main_grad if weight.requires_grad else None,
                grad_scale=objective.weights[label]
                * objective.scale
                * (share.final if label == FINAL else share.exits),
            )
            if features.requires_grad:
                features.backward(tp.reduce(head.grad_hidden.unflatten(0, (-1, features.shape[1]))))
            terms.loss[label] = head.loss
            if head.confidence is not None:
                terms.confidence[label] = head.confidence
            gradients += [(_edge(tap), leaf.grad) for tap, leaf in zip(taps, leaves, strict=True) if tap.requires_grad]
        return terms, gradients

    def backward(self, activations: Activations, gradients: Gradients, received: Tensor | None = None) -> Tensor | None:
        """B: one backward pass through the stage's layers and embedding, from the heads' gradients and the one that
        the next stage sent. Returns the gradient for the stage before; None on the first."""
        if received is not None:
            gradients = [*gradients, (activations.end, received)]
        if gradients:
            edges, grads = zip(*gradients, strict=True)
            torch.autograd.backward(edges, grads)
        return None if activations.received is None else activations.received.grad

    def backward_input(
        self, activations: Activations, gradients: Gradients, received: Tensor | None = None
    ) -> tuple[Tensor | None, list[Callable[[], None]]]:
        """I: B but for the gradients of the layers' matrices, which the functions returned beside add when called."""
        assert self.later is not None, "the stage was not built for split backward passes"
        with self.later.deferring() as waiting:
            made = self.backward(activations, gradients, received)
        return made, waiting

    @torch.no_grad()
    def score(self, activations: Activations, batch: TokenBatch) -> dict[str, HeadLoss]:
        """Plain cross-entropy and top id of every position, [s * b], for the heads of this stage."""
        labels, mask = batch.labels.t().flatten(), batch.loss_mask.t().flatten()
        heads: dict[str, HeadLoss] = {}
        for label in self.spec.heads:
            features = self.model.features(label, activations.taps[label], activations.context)
            weight = self.model.output_weight(label)
            heads[label] = linear_cross_entropy(
                self.model.tp.gather(features).flatten(0, 1),
                weight,
                labels,
                mask,
                need_grad=False,
                argmax_over=self.vocab_size,
                shard=vocab_shard(weight, self.model.tp),
            )
        return heads


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Where a gradient enters the graph of a tensor, without the tensor; None where none is wanted."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def head_scores(heads: dict[str, HeadLoss], final: Tensor, batch: TokenBatch) -> dict[str, HeadScore]:
    """What `Stage.score` found, held against labels and the final head's top ids [s * b]."""
    labels, mask = batch.labels.t().flatten(), batch.loss_mask.t().flatten()
    return {
        label: HeadScore(head.loss, ((head.argmax == labels) * mask).sum(), ((head.argmax == final) * mask).sum())
        for label, head in heads.items()
    }


def vocab_shard(weight: Tensor, tp: TensorParallel) -> VocabShard | None:
    """Which rows of the vocabulary a tp rank's output matrix has; None where it has all."""
    return None if tp.size == 1 else VocabShard(tp.rank * weight.shape[0], tp.group)
