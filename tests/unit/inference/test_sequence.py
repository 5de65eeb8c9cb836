import pytest
import torch

from megatron.exits.spec import FINAL
from megatron.inference.sequence import Places, SequenceState, cut
from megatron.model.gpt import GPT
from tests.unit.inference.models import VARIANTS, all_logits, make, prompt_of

CAPACITY = 24


def state_of(model: GPT) -> SequenceState:
    segments = cut(model.config.num_layers, model.exit_specs())
    return SequenceState(model, segments, Places(model), CAPACITY)


def caches(state: SequenceState) -> list:
    layers = [cache for segment in state._layers for _, cache in segment]
    return layers + [cache for cache in state._block_kv if cache is not None]


def test_segments_end_where_exits_tap() -> None:
    assert [(s.first, s.last, s.head) for s in cut(4, make("gpt").exit_specs())] == [
        (0, 1, "1"),
        (1, 3, "3"),
        (3, 4, FINAL),
    ]
    assert [(s.first, s.last) for s in cut(4, make("pre_exit").exit_specs())] == [(0, 0), (0, 1), (1, 3), (3, 4)]
    assert [(s.first, s.last) for s in cut(4, make("last_layer").exit_specs())] == [(0, 2), (2, 4), (4, 4)]
    assert [(s.first, s.last, s.head) for s in cut(4, ())] == [(0, 4, FINAL)]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_features_equal_those_of_the_training_forward(variant: str) -> None:
    model = make(variant)
    ids, state = prompt_of(20), state_of(model)
    expected = all_logits(model, ids)
    position = 0
    for chunk, depth in ((5, 1), (1, 1), (1, 1), (3, 2), (1, 1), (2, 9), (1, 9), (1, 1), (4, 2), (1, 9)):
        state.append(ids[position : position + chunk])
        position += chunk
        for index, segment in enumerate(state.segments[:depth]):
            logits = state.advance(index)[0, 0] @ model.output_weight(segment.head)[:60].t()
            torch.testing.assert_close(logits, expected[segment.head][position - 1], rtol=0, atol=1e-10)
    assert position == len(ids)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_completed_caches_equal_a_clean_pass(variant: str) -> None:
    model = make(variant)
    ids = prompt_of(18, seed=3)
    clean, deferred = state_of(model), state_of(model)
    clean.append(ids)
    clean.complete()
    position = 0
    for chunk, depth in ((4, 1), (1, 1), (1, 2), (1, 1), (1, 3), (8, 1), (1, 2), (1, 1)):
        deferred.append(ids[position : position + chunk])
        position += chunk
        for index in range(min(depth, len(deferred.segments))):
            deferred.advance(index)
    deferred.complete()
    assert clean.deferred == deferred.deferred == 0
    assert clean.layer_executions == deferred.layer_executions
    for ours, theirs in zip(caches(deferred), caches(clean), strict=True):
        assert ours.length == theirs.length == len(ids)
        torch.testing.assert_close(ours.keys[: len(ids)], theirs.keys[: len(ids)], rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.values[: len(ids)], theirs.values[: len(ids)], rtol=0, atol=1e-12)


@torch.inference_mode()
def test_deferred_counts_positions_not_through_all_layers() -> None:
    state = state_of(make("llama"))
    state.append(prompt_of(5))
    assert state.deferred == 5
    state.advance(0)
    state.append([1])
    state.advance(0)
    state.advance(1)
    assert state.deferred == 6
    state.complete()
    assert state.deferred == 0
    passes = state.layer_passes
    state.complete()  # nothing waits: nothing runs
    assert state.layer_passes == passes
