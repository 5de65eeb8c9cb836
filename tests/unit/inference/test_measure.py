import pytest

from megatron.errors import ConfigError
from megatron.inference.engine import Engine
from megatron.inference.measure import agreement, as_table, compare_thresholds
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import SamplingParams
from tests.unit.inference.models import engine_of, make, prompt_of

PROMPTS = [prompt_of(8, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(make("llama"))


def test_the_full_model_agrees_with_itself(engine: Engine) -> None:
    result = engine.generate(PROMPTS[0], SamplingParams(12))
    assert agreement(engine, PROMPTS[0], result.ids) == 1.0


def test_agreement_counts_tokens_on_the_emitted_prefix(engine: Engine) -> None:
    """After a token that differs, the full model is asked about the text as it stands, not about its own."""
    policy = ConfidencePolicy(0.2)
    emitted = engine.generate(PROMPTS[1], SamplingParams(16), policy).ids
    expected = [
        engine.generate([*PROMPTS[1], *emitted[:i]], SamplingParams(1)).ids[0] == token
        for i, token in enumerate(emitted)
    ]
    assert 0 < sum(expected) < len(expected)
    assert agreement(engine, PROMPTS[1], emitted) == sum(expected) / len(expected)


def test_rows_of_the_comparison(engine: Engine) -> None:
    told = []
    rows = compare_thresholds(engine, PROMPTS, [1.0, 0.3, 0.0], 10, 2, on_progress=lambda *done: told.append(done))
    assert told[-1] == (3 * 4 * 2, 3 * 4 * 2)
    full, never, some, always = rows
    assert [row.threshold for row in rows] == [None, 1.0, 0.3, 0.0]
    assert full.speed_up == full.agreement == full.identical == full.layer_passes == full.layer_executions == 1.0
    assert full.exit_shares == never.exit_shares == {"1": 0.0, "3": 0.0, "final": 1.0}
    assert never.agreement == never.identical == never.layer_passes == 1.0
    assert always.exit_shares == {"1": 1.0, "3": 0.0, "final": 0.0}
    assert always.layer_passes == 0.25
    assert 0.2 < always.layer_executions < 0.3  # the prompt counts, and is spread over outputs of other lengths
    assert sum(some.exit_shares.values()) == pytest.approx(1.0)
    assert always.agreement < 1.0
    assert 0.25 < some.layer_passes < 1.0
    assert all(row.tokens_per_s > 0 for row in rows)


def test_exit_layers_are_passed_on(engine: Engine) -> None:
    (_, row) = compare_thresholds(engine, PROMPTS[:1], [0.0], 4, 1, exit_layers=(3,))
    assert row.exit_shares == {"1": 0.0, "3": 1.0, "final": 0.0}


def test_too_long_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="positions"):
        compare_thresholds(engine, [prompt_of(38)], [0.5], 10)


def test_table(engine: Engine) -> None:
    text = as_table(compare_thresholds(engine, PROMPTS[:1], [0.25], 4, 1))
    lines = text.splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "exit 1" in lines[0]
    assert "full model" in lines[1]
    assert "1.00x" in lines[1]
    assert lines[2].split()[0] == "0.25"
