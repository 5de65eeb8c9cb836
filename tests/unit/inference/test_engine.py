import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import CheckpointError, ConfigError
from megatron.exits.spec import FINAL
from megatron.inference.engine import Engine
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import Result, SamplingParams
from megatron.tokenizer.null import NullTokenizer
from tests.unit.inference.models import (
    EOD,
    POSITIONS,
    VARIANTS,
    VOCAB,
    Reference,
    all_logits,
    engine_of,
    make,
    prompt_of,
    slow_greedy,
)

WITH_EXITS = [name for name in VARIANTS if name != "no_exits"]


def params(count: int = 12, **changes: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **changes)


def same(result: Result, reference: list[Reference]) -> None:
    assert [(t.id, t.exit) for t in result.tokens] == [(r.id, r.exit) for r in reference]
    for token, expected in zip(result.tokens, reference, strict=True):
        assert token.confidence == pytest.approx(expected.confidence, abs=1e-10)
        assert token.log_prob == pytest.approx(float(expected.logits.log_softmax(-1)[expected.id]), abs=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", [None, ConfidencePolicy(1.0), ConfidencePolicy(40.0)])
def test_without_exits_it_is_the_plain_model(variant: str, policy: ConfidencePolicy | None) -> None:
    model = make(variant)
    result = engine_of(model).generate(prompt_of(7), params(), policy)
    same(result, slow_greedy(model, prompt_of(7), 12))
    assert {token.exit for token in result.tokens} == {FINAL}


@pytest.mark.parametrize("variant", WITH_EXITS)
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_threshold_zero_always_takes_the_first_exit(variant: str, threshold: float) -> None:
    model = make(variant)
    result = engine_of(model).generate(prompt_of(6), params(), ConfidencePolicy(threshold))
    same(result, slow_greedy(model, prompt_of(6), 12, threshold))
    assert {token.exit for token in result.tokens} == {model.head_labels()[0]}


@settings(max_examples=100, deadline=None)
@given(
    variant=st.sampled_from(WITH_EXITS),
    seed=st.integers(0, 5),
    length=st.integers(1, 16),
    threshold=st.floats(0.05, 0.99),
    cap=st.sampled_from([None, 0, 1, 3]),
    first_only=st.booleans(),
)
def test_deferral_is_exact(
    variant: str, seed: int, length: int, threshold: float, cap: int | None, first_only: bool
) -> None:
    model = make(variant, seed)
    layers = (int(model.head_labels()[0]),) if first_only else ()
    policy = ConfidencePolicy(threshold, layers, cap)
    result = engine_of(model).generate(prompt_of(length, seed), params(16), policy)
    same(result, slow_greedy(model, prompt_of(length, seed), 16, threshold, layers))


def test_the_property_above_meets_all_kinds_of_tokens() -> None:
    """Exits and deep tokens mix within one text: else the test above would show nothing."""
    model = make("llama", seed=2)
    result = engine_of(model).generate(prompt_of(8, 2), params(24), ConfidencePolicy(0.2))
    assert {token.exit for token in result.tokens} == set(model.head_labels())
    assert len({token.layer_executions for token in result.tokens}) > 2


@pytest.mark.parametrize("variant", WITH_EXITS)
def test_a_lower_threshold_never_leaves_later(variant: str) -> None:
    model = make(variant)
    engine, depth = engine_of(model), {head: i for i, head in enumerate(model.head_labels())}
    for seed in range(4):
        taken = [
            depth[engine.generate(prompt_of(9, seed), params(1), ConfidencePolicy(threshold)).tokens[0].exit]
            for threshold in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
        ]
        assert taken == sorted(taken)


@pytest.mark.parametrize("variant", ["llama", "exit_block"])
@pytest.mark.parametrize("cap", [0, 1, 2, 5])
def test_cap_on_deferred_tokens_changes_no_token(variant: str, cap: int) -> None:
    engine = engine_of(make(variant))
    free = engine.generate(prompt_of(5), params(20), ConfidencePolicy(0.4))
    capped = engine.generate(prompt_of(5), params(20), ConfidencePolicy(0.4, max_deferred=cap))
    assert [t[:2] for t in capped.tokens] == [t[:2] for t in free.tokens]
    assert capped.layer_passes >= free.layer_passes


@pytest.mark.parametrize("cap", [0, 1, 2])
def test_no_more_positions_than_the_cap_stay_deferred(cap: int) -> None:
    """All leave after layer 1 of 4; the other 3 layers then run over `cap` + 1 positions at a time."""
    result = engine_of(make("llama")).generate(prompt_of(5), params(9), ConfidencePolicy(0.0, max_deferred=cap))
    catch_up = [token.layer_executions - 1 for token in result.tokens[1:]]
    assert catch_up[0] == 3 * 5  # the prompt
    later = [(3 * (cap + 1) if i % (cap + 1) == 0 else 0) for i in range(1, 8)]
    assert catch_up[1:] == later


def test_exits_not_in_exit_layers_are_not_taken() -> None:
    model = make("llama")
    result = engine_of(model).generate(prompt_of(8), params(20), ConfidencePolicy(0.0, exit_layers=(3,)))
    assert {token.exit for token in result.tokens} == {"3"}
    unknown = engine_of(model).generate(prompt_of(8), params(20), ConfidencePolicy(0.0, exit_layers=(2,)))
    assert {token.exit for token in unknown.tokens} == {FINAL}


def test_layers_are_counted() -> None:
    engine = engine_of(make("llama"))  # 4 layers, first exit after 1
    full = engine.generate(prompt_of(8), params(5))
    assert [(t.layer_passes, t.layer_executions) for t in full.tokens] == [(4, 32)] + [(4, 4)] * 4
    early = engine.generate(prompt_of(8), params(5), ConfidencePolicy(0.0))
    assert [(t.layer_passes, t.layer_executions) for t in early.tokens] == [(1, 8)] + [(1, 1)] * 4
    assert (early.layer_passes, early.layer_executions) == (5, 12)


def test_choices_are_those_of_the_plain_forward_pass() -> None:
    for variant in VARIANTS:
        model = make(variant)
        ids = prompt_of(12)
        expected = all_logits(model, ids)[FINAL].argmax(-1).tolist()
        assert engine_of(model).choices(ids, start=5) == expected[4:]
        assert engine_of(model).choices(ids[:1], start=1) == expected[:1]


def test_sampling_draws_from_the_head_that_emits() -> None:
    """Temperature decides neither where a token leaves nor its reported log-probability."""
    model = make("llama")
    engine = engine_of(model)
    result = engine.generate(prompt_of(6), params(20, temperature=2.0, seed=3), ConfidencePolicy(0.3))
    ids = prompt_of(6)
    for token in result.tokens:
        logits = {head: values[-1] for head, values in all_logits(model, ids).items()}
        confident = [head for head in logits if head != FINAL and logits[head].softmax(-1).max() >= 0.3]
        assert token.exit == (confident[0] if confident else FINAL)
        assert token.log_prob == pytest.approx(float(logits[token.exit].log_softmax(-1)[token.id]), abs=1e-10)
        ids.append(token.id)
    assert any(token.log_prob < -1.5 for token in result.tokens)


def test_a_seed_gives_one_text() -> None:
    engine = engine_of(make("gpt"))

    def ids(seed: int) -> list[int]:
        return engine.generate(prompt_of(4), params(16, temperature=1.5, seed=seed)).ids

    assert ids(7) == ids(7)
    assert len({tuple(ids(seed)) for seed in range(5)}) == 5
    interrupted = engine.stream(prompt_of(4), params(16, temperature=1.5, seed=7))
    first = next(interrupted).id  # another request in between takes nothing from this one's stream
    ids(8)
    assert [first, *(token.id for token in interrupted)] == ids(7)


def test_it_stops_at_the_end_of_document() -> None:
    model = make("gpt")
    plain = engine_of(model).generate(prompt_of(5), params(10))
    stop = plain.ids[3]
    first = plain.ids.index(stop)

    class Stops(NullTokenizer):
        eos = stop

    result = Engine(model, Stops(VOCAB - 1)).generate(prompt_of(5), params(10))
    assert result.ids == plain.ids[: first + 1]
    assert (result.finish_reason, plain.finish_reason) == ("eod", "length")
    assert result.text == " ".join(map(str, plain.ids[:first]))

    class Endless(NullTokenizer):
        eos = None

    assert Engine(model, Endless(VOCAB - 1)).generate(prompt_of(5), params(10)).ids == plain.ids


def test_a_prompt_may_end_in_the_end_of_document() -> None:
    result = engine_of(make("gpt")).generate([EOD], params(3))
    assert len(result.tokens) == 3 or result.ids[-1] == EOD


def test_limits_are_checked_before_any_work() -> None:
    engine = engine_of(make("gpt"))
    fits = engine.generate(prompt_of(POSITIONS - 4), params(4))
    assert len(fits.tokens) == 4
    with pytest.raises(ConfigError, match=r"37 tokens and 4 to generate exceed the model's 40 positions"):
        engine.stream(prompt_of(POSITIONS - 3), params(4))
    with pytest.raises(ConfigError, match="empty"):
        engine.stream([], params(4))
    with pytest.raises(ConfigError, match="id 60, outside the vocabulary of 60"):
        engine.stream([1, 60], params(4))
    with pytest.raises(ConfigError, match="tokenizer has 66 ids"):
        Engine(make("gpt"), NullTokenizer(65))


def test_damaged_weights_are_said() -> None:
    model = make("gpt")
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        engine_of(model).generate(prompt_of(4), params(4))


def test_16_bit_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = make("llama").to(dtype)
        result = engine_of(model).generate(prompt_of(6), params(8), ConfidencePolicy(0.5))
        assert len(result.tokens) == 8
        assert all(0 < token.confidence <= 1 for token in result.tokens)
