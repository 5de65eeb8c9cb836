"""Greedy generation with early exits: tokens, texts, exits and confidences as recorded from the original's server."""

import json
import math
from pathlib import Path

import pytest

from megatron.config.data import TokenizerConfig
from megatron.exits.spec import ExitSpec
from megatron.inference.build import load_model
from megatron.inference.engine import Engine
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import SamplingParams

# The original's confidences count padding rows, ours don't: they may differ, and so may a decision as close as this.
MARGIN = 1e-2


class Recorder(ConfidencePolicy):
    """The policy under test, remembering what it was asked."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        object.__setattr__(self, "asked", [])

    def wants_exit(self, spec: ExitSpec, confidence: float) -> bool:
        leaves = super().wants_exit(spec, confidence)
        self.asked.append((spec.label, confidence, leaves))
        return leaves


def comparable(record: dict) -> bool:
    """One prompt, greedy, answered, and meant alike (the original took `use_early_exit: false` as true)."""
    request = record["request"]
    greedy = request.get("top_k") == 1 or not (request.get("temperature") or request.get("top_k"))
    greedy &= not request.get("top_p")
    one = isinstance(request["prompts"], str) or len(request["prompts"]) == 1
    means_it = request.get("use_early_exit", True) is not False
    return record["status"] == 200 and record["tokens"] and one and greedy and means_it


def decisions(record: dict, policy: ConfidencePolicy | None) -> list[dict]:
    """Recorded evaluations of exits that the policy looks at."""
    if policy is None:
        return []
    layers = policy.exit_layers
    return [e for e in record["trace"] if "layer" in e and (not layers or e["layer"] in layers)]


def policy_of(request: dict) -> Recorder | None:
    if "use_early_exit" not in request:
        return None
    return Recorder(request.get("early_exit_thres", 40.0), tuple(request.get("exit_layers", ())))


def cases(golden_dir: Path) -> list[Path]:
    return sorted(path.parent for path in golden_dir.glob("*/reqs.out.json"))


def engine_for(case: Path, golden_dir: Path) -> Engine:
    argv = (case / "reqs.argv.txt").read_text().split()
    flags = {argv[i]: argv[i + 1] for i in range(len(argv) - 1)}
    words = TokenizerConfig(flags["--tokenizer-type"], str(golden_dir / flags["--tokenizer-model"]))
    model, tokenizer, _ = load_model(golden_dir / flags["--load"], device="cpu", dtype="float32", tokenizer=words)
    return Engine(model, tokenizer)


def test_recorded_requests(golden_dir: Path) -> None:
    if not cases(golden_dir):
        pytest.skip("no recorded requests: give --golden DIR")
    for case in cases(golden_dir):
        engine = engine_for(case, golden_dir)
        records = [record for record in json.loads((case / "reqs.out.json").read_text()) if comparable(record)]
        compared = [check(engine, record) for record in records]
        assert sum(compared) >= len(records) / 2


def check(engine: Engine, record: dict) -> bool:
    """Whether the record could be compared; it is, as far as its decisions are clear."""
    request = record["request"]
    policy = policy_of(request)
    recorded = decisions(record, policy)
    if policy is not None and any(abs(e["maxprob"][0] - policy.threshold) < MARGIN for e in recorded):
        return False
    prompt = record["prompt_tokens"][0]
    if request.get("add_BOS"):
        prompt = [engine.tokenizer.eod, *prompt]
    count = request["tokens_to_generate"]
    result = engine.generate(prompt, SamplingParams(max_new_tokens=count), policy)
    name = request["_name"]
    assert result.ids == record["tokens"][0][:count], name
    assert result.text == record["response"]["text"][0], name
    if policy is not None and policy.threshold < 1:
        expected = [(str(e["layer"]), e["exited"]) for e in recorded]
        assert [(label, leaves) for label, _, leaves in policy.asked] == expected, name
        for (_, confidence, _), e in zip(policy.asked, recorded, strict=True):
            assert confidence == pytest.approx(e["maxprob"][0], abs=MARGIN), name
    check_log_probs(result.tokens, record["response"]["logprobs"], name)
    return True


def check_log_probs(tokens: tuple, recorded: list | None, name: str) -> None:
    """Up to the first exit only: the original's later ones are wrong."""
    for token, log_prob in zip(tokens, recorded[0] if recorded else [], strict=False):
        if token.exit != "final":
            return
        assert token.log_prob == pytest.approx(log_prob, abs=math.log1p(MARGIN)), name
