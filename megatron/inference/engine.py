"""Generation for one sequence at a time: advance to an exit, look, leave or go on, choose a token.

`Engine` is built once per model. Exits that no policy asks for cost nothing; only the newest position's logits are
ever computed, over the tokenizer's ids without the padding rows.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.errors import CheckpointError, ConfigError
from megatron.inference.policy import ExitPolicy
from megatron.inference.request import Result, SamplingParams, Token
from megatron.inference.sampler import Sampler
from megatron.inference.sequence import Places, SequenceState, cut
from megatron.model.gpt import GPT
from megatron.tokenizer.base import Tokenizer


class Verdict(NamedTuple):
    """What one head says of the newest position: logits [1, vocabulary], the top one's probability and id [1]."""

    head: str
    logits: Tensor
    confidence: float
    top: Tensor


class Engine:
    """Generates with a whole model in evaluation mode, whose weights must not change while this lives."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Raises ConfigError where the tokenizer has ids that the model has no rows for."""
        assert len(model.stages) == 1 and model.stages[0].is_last and not model.training
        if tokenizer.vocab_size > model.padded_vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model rows for {model.padded_vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self._eod = _eod(tokenizer)
        self._places = Places(model)
        self._matrices = _output_matrices(model, tokenizer.vocab_size)

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, policy: ExitPolicy | None = None
    ) -> Iterator[Token]:
        """Yield tokens as they resolve, the end-of-document token (where it comes) last.

        policy None is the full model. Raises ConfigError at once for an empty prompt, foreign ids, or a length
        beyond the model's positions.
        """
        ids = list(prompt_ids)
        self._check(ids, params)
        active = [spec for spec in self.model.exit_specs() if policy is not None and policy.evaluates(spec)]
        segments = cut(self.model.config.num_layers, active)
        sequence = SequenceState(self.model, segments, self._places, len(ids) + params.max_new_tokens)
        return self._run(sequence, ids, params, policy)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, policy: ExitPolicy | None = None) -> Result:
        """Run `stream` to its end."""
        tokens = tuple(self.stream(prompt_ids, params, policy))
        ids = [token.id for token in tokens]
        ended = ids[-1] == self._eod
        text = self.tokenizer.detokenize(ids[:-1] if ended else ids)
        return Result(tokens, text, "eod" if ended else "length")

    @torch.inference_mode()
    def choices(self, ids: Sequence[int], start: int) -> list[int]:
        """The full model's greedy choice after each of the prefixes ids[:start], ids[:start + 1], … ids.

        One pass over `ids` without caches: the teacher-forced reference for `stream`.
        """
        hidden = self.model.embedding(torch.tensor([ids], device=self._device), self._places.ids(0, len(ids)), None)
        context = self._places.context(0, len(ids))
        for layer in self.model.layers.values():
            hidden = layer(hidden, context).hidden
        features = self.model.final_norm(hidden[start - 1 :, 0])
        matrix = self._matrices[self.model.head_labels()[-1]]
        return [int(i) for part in features.split(256) for i in (part @ matrix).max(-1).indices]

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.word.weight.device

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        limit = self.model.config.max_positions
        if not ids:
            raise ConfigError("the prompt is empty: give at least one token")
        foreign = next((i for i in ids if not 0 <= i < self.tokenizer.vocab_size), None)
        if foreign is not None:
            raise ConfigError(f"the prompt holds id {foreign}, outside the vocabulary of {self.tokenizer.vocab_size}")
        if len(ids) + params.max_new_tokens > limit:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens and {params.max_new_tokens} to generate exceed the model's "
                f"{limit} positions: shorten the prompt or generate fewer"
            )

    @torch.inference_mode()
    def _run(
        self, sequence: SequenceState, ids: list[int], params: SamplingParams, policy: ExitPolicy | None
    ) -> Iterator[Token]:
        sampler = Sampler(params)
        cap = None if policy is None else policy.max_deferred
        for _ in range(params.max_new_tokens):
            begin = time.perf_counter()
            passes, executions = sequence.layer_passes, sequence.layer_executions
            if cap is not None and sequence.deferred > cap:
                sequence.complete()
            sequence.append(ids)
            verdict = self._decide(sequence, policy)
            token, log_prob = _choose(verdict, sampler)
            yield Token(
                token,
                verdict.head,
                verdict.confidence,
                log_prob,
                time.perf_counter() - begin,
                sequence.layer_passes - passes,
                sequence.layer_executions - executions,
            )
            if token == self._eod:
                return
            ids = [token]

    def _decide(self, sequence: SequenceState, policy: ExitPolicy | None) -> Verdict:
        """Advance the newest position from exit to exit until it may leave."""
        for index, segment in enumerate(sequence.segments):
            verdict = self._look(segment.head, sequence.advance(index))
            if segment.exit is None or policy.wants_exit(segment.exit, verdict.confidence):
                break
        return verdict

    def _look(self, head: str, features: Tensor) -> Verdict:
        """One host synchronisation: the confidence, by which everything further is decided."""
        logits = features[0] @ self._matrices[head]
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
        confidence, top = logits.softmax(-1).max(-1)
        return Verdict(head, logits, confidence.item(), top)


def _choose(verdict: Verdict, sampler: Sampler) -> tuple[int, float]:
    """The token and its log-probability before temperature, top-k and top-p."""
    if math.isnan(verdict.confidence):
        raise CheckpointError("the model's probabilities are not finite: its weights are damaged or diverged")
    log_top = math.log(verdict.confidence)
    top, token = int(verdict.top), sampler.draw(verdict.logits[0])
    if token is None or token == top:
        return top, log_top
    below = verdict.logits[0, token] - verdict.logits[0, top]
    return token, log_top + below.item()


def _eod(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document; None where the tokenizer has none, and only the length ends a generation."""
    return None if tokenizer.eos is None else tokenizer.eod


def _output_matrices(model: GPT, vocab_size: int) -> dict[str, Tensor]:
    """By head: the output matrix without padding rows, [h, vocabulary]; heads that share one share it here.

    On the CPU a copy in this order: one row times it takes 0.6 of the time that [vocabulary, h] takes.
    """
    by_head, made = {}, {}
    for head in model.head_labels():
        weight = model.output_weight(head).detach()
        if weight.data_ptr() not in made:
            matrix = weight[:vocab_size].t()
            made[weight.data_ptr()] = matrix.contiguous() if weight.device.type == "cpu" else matrix
        by_head[head] = made[weight.data_ptr()]
    return by_head
