"""One pipeline stage as the schedule sees it: F (forward), E (heads: loss and their backward), B (backward).

E runs a microbatch's exit heads forward and backward against detached taps, just before its B, so the logits and
graphs of the heads of waiting microbatches never exist together. B is one backward pass from the taps (and, later,
from the gradient of the next stage).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.exits.loss import LossTerms, Objective
from megatron.exits.spec import FINAL
from megatron.model.gpt import GPT, Taps
from megatron.nn.cross_entropy import HeadLoss, linear_cross_entropy
from megatron.nn.layer import LayerContext
from megatron.parallel.rng import DropoutStream


class TokenBatch(Protocol):
    """One microbatch on the device: each [b, s]; the last two are None unless documents are kept apart."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None
    document_ids: Tensor | None


@dataclass
class Activations:
    """What F leaves for E and B of the same microbatch."""

    hidden: Tensor
    taps: Taps
    context: LayerContext


@dataclass(frozen=True)
class HeadScore:
    """Sums over one batch's unmasked tokens for one head: cross-entropy, hits, agreement with the final head."""

    loss: Tensor
    correct: Tensor
    agree: Tensor


class Stage:
    """A `GPT` span with the training and evaluation passes over it."""

    def __init__(self, model: GPT, vocab_size: int | None = None) -> None:
        """`vocab_size`: true ids, where the model's matrices are padded beyond them."""
        self.model = model
        self.vocab_size = vocab_size or model.padded_vocab_size

    def forward(self, batch: TokenBatch, stream: DropoutStream | None) -> Activations:
        """F: embed and run the layers; keeps the taps of the heads."""
        model = self.model
        hidden = model.embedding(batch.tokens, batch.position_ids, stream)
        context = model.context(batch.tokens.shape[1], hidden, batch.document_ids, stream)
        hidden, taps = model(hidden, context)
        return Activations(hidden, taps, context)

    def backward_heads(
        self, activations: Activations, batch: TokenBatch, objective: Objective
    ) -> tuple[LossTerms, list[tuple[Tensor, Tensor]]]:
        """E: every head's loss, its gradients in the head's parameters, and (tap, gradient) pairs for B."""
        terms, gradients = LossTerms(), []
        labels = batch.labels.t().flatten()
        precise = torch.promote_types(torch.float32, activations.hidden.dtype)
        token_weights = objective.token_weights(batch.loss_mask.to(precise)).t().flatten()
        for label in self.model.head_labels():
            taps = activations.taps[label]
            leaves = tuple(tap.detach().requires_grad_(tap.requires_grad) for tap in taps)
            with torch.enable_grad():
                features = self.model.features(label, leaves, activations.context)
            weight = self.model.output_weight(label)
            head = linear_cross_entropy(
                features.detach().flatten(0, 1),
                weight.detach(),
                labels,
                token_weights,
                temperature=objective.temperatures.get(label, 1.0),
                dynamic=label in objective.dynamic,
                grad_weight=weight.main_grad if weight.requires_grad else None,
                grad_scale=objective.weights[label] * objective.loss_scale,
            )
            if features.requires_grad:
                features.backward(head.grad_hidden.view_as(features))
            terms.loss[label] = head.loss
            if head.confidence is not None:
                terms.confidence[label] = head.confidence
            gradients += [(tap, leaf.grad) for tap, leaf in zip(taps, leaves, strict=True) if tap.requires_grad]
        return terms, gradients

    def backward(self, gradients: list[tuple[Tensor, Tensor]]) -> None:
        """B: one backward pass through the stage's layers and embedding."""
        if gradients:
            taps, grads = zip(*gradients, strict=True)
            torch.autograd.backward(taps, grads)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> dict[str, HeadScore]:
        """Plain cross-entropy, next-token hits and agreement with the final head, per head, without dropout."""
        activations = self.forward(batch, None)
        labels, mask = batch.labels.t().flatten(), batch.loss_mask.t().flatten()
        heads: dict[str, HeadLoss] = {}
        for label in self.model.head_labels():
            features = self.model.features(label, activations.taps[label], activations.context)
            heads[label] = linear_cross_entropy(
                features.flatten(0, 1),
                self.model.output_weight(label),
                labels,
                mask,
                need_grad=False,
                argmax_over=self.vocab_size,
            )
        final = heads[FINAL].argmax
        return {
            label: HeadScore(head.loss, ((head.argmax == labels) * mask).sum(), ((head.argmax == final) * mask).sum())
            for label, head in heads.items()
        }
