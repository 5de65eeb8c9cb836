"""The state of one sequence while it is decoded, and its one operation: `advance`.

Layers are cut into segments at the exits that are looked at. Before each segment stands a queue of hidden states;
`advance` runs a segment over all that waits before it, in one batch. A token that leaves early stays in the queue
behind its exit and is computed when a later token goes deeper: every layer sees the hidden states of every
position's own full computation (what EE-LLM's KV recomputation yields), and no layer sees a position twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.exits.spec import FINAL, ExitSpec
from megatron.model.gpt import GPT
from megatron.nn.attention import attention_mask
from megatron.nn.kv import LayerKV
from megatron.nn.layer import LayerContext
from megatron.nn.rotary import rotary_tables


@dataclass(frozen=True)
class Segment:
    """Layers [first, last) and what stands behind them: an early exit, or None for the model's own head."""

    first: int
    last: int
    exit: ExitSpec | None

    @property
    def head(self) -> str:
        """Label of the head behind the segment."""
        return FINAL if self.exit is None else self.exit.label


def cut(num_layers: int, exits: Sequence[ExitSpec]) -> tuple[Segment, ...]:
    """Cut a model's layers at the given exits (shallow first); the last segment ends at the final head."""
    segments, first = [], 0
    for spec in exits:
        last = spec.layer if spec.tap == "input" else spec.layer + 1
        segments.append(Segment(first, last, spec))
        first = last
    return (*segments, Segment(first, num_layers, None))


class Places:
    """What depends on positions alone: rotary tables and position ids, made once per model, and masks."""

    def __init__(self, model: GPT) -> None:
        config, like = model.config, model.embedding.word.weight
        limit = config.max_positions
        self._window = config.window_size
        self._rope = rotary_tables(config, 0, limit, like) if config.position_embedding_type == "rope" else None
        learned = config.position_embedding_type == "learned_absolute"
        self._ids = torch.arange(limit, device=like.device)[None] if learned else None
        self._like = like

    def ids(self, start: int, stop: int) -> Tensor | None:
        """Position ids [1, stop - start], where the embedding needs them."""
        return None if self._ids is None else self._ids[:, start:stop]

    def context(self, start: int, stop: int) -> LayerContext:
        """Rotary tables of positions start..stop-1, and their mask over keys 0..stop-1."""
        rope = None if self._rope is None else (self._rope[0][start:stop], self._rope[1][start:stop])
        mask = attention_mask(stop - start, stop, self._window, None, self._like.device)
        if mask is not None:  # additive at once: attention would turn it into that in every layer anew
            mask = self._like.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        return LayerContext(rope, mask)


class SequenceState:
    """Hidden states, keys and values of one sequence of at most `capacity` positions."""

    def __init__(self, model: GPT, segments: tuple[Segment, ...], places: Places, capacity: int) -> None:
        self.segments = segments
        self.length = 0
        self.layer_passes = self.layer_executions = 0
        self._model, self._places = model, places
        config, like = model.config, model.embedding.word.weight
        shape = (1, config.num_kv_heads, config.head_dim)
        self._layers = [
            [(model.layers[str(i)], LayerKV(capacity, shape, like)) for i in range(segment.first, segment.last)]
            for segment in segments
        ]
        self._block_kv = [
            LayerKV(capacity, shape, like) if segment.exit and model.exits[segment.head].block is not None else None
            for segment in segments
        ]
        self._queues: list[list[Tensor]] = [[] for _ in segments]
        self._depth = [0] * len(segments)

    @property
    def deferred(self) -> int:
        """Positions that have not been through all layers."""
        return self.length - self._depth[-1]

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens at the end; they wait before the first segment."""
        tokens = torch.tensor([ids], device=self._model.embedding.word.weight.device)
        stop = self.length + len(ids)
        self._queues[0].append(self._model.embedding(tokens, self._places.ids(self.length, stop), None))
        self.length = stop

    def advance(self, index: int, need_features: bool = True) -> Tensor | None:
        """Bring all positions that wait before segment `index` through it.

        Returns what the head behind it multiplies with its output matrix for the newest position, [1, 1, h];
        None, and no more work than keys and values need, without `need_features`.
        """
        segment, waiting = self.segments[index], self._queues[index]
        hidden = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
        self._queues[index] = []
        start, stop = self._depth[index], self._depth[index] + hidden.shape[0]
        self._depth[index] = stop
        context = self._places.context(start, stop)
        tap: tuple[Tensor, ...] = (hidden,)
        for layer, cache in self._layers[index]:
            out = layer(hidden, context, cache)
            hidden, tap = out.hidden, (out.mlp_residual, out.mlp_input)
        if segment.exit is None or segment.exit.tap != "mlp":
            tap = (hidden,)
        if segment.exit is not None:
            self._queues[index + 1].append(hidden)
        block_kv = self._block_kv[index]
        self._count(len(self._layers[index]) + (block_kv is not None), stop - start)
        if block_kv is not None:  # its keys and values are needed of every position that passes
            return self._model.features(segment.head, tap, context, block_kv)[-1:]
        if not need_features:
            return None
        return self._model.features(segment.head, tuple(part[-1:] for part in tap), context)

    def complete(self) -> None:
        """Bring every position through all layers: fills keys and values, computes no logits."""
        for index in range(len(self.segments)):
            if self._queues[index]:
                self.advance(index, need_features=False)

    def _count(self, layers: int, positions: int) -> None:
        self.layer_passes += layers
        self.layer_executions += layers * positions
