"""What early exits gain and what they cost: speed and agreement with the full model, measured side by side."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from megatron.exits.spec import FINAL
from megatron.inference.engine import Engine
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import Result, SamplingParams


@dataclass(frozen=True)
class Comparison:
    """One row of the table: greedy decoding at one threshold (None: the full model) over a set of prompts.

    tokens_per_s, speed_up: from median wall time per output token, prompt reading included. exit_shares: share of
    tokens by head. agreement: share of tokens that are the full model's greedy choice on the same prefix.
    identical: share of prompts whose whole output is the full model's. layer_passes, layer_executions: relative to
    the full model (batches of positions through a layer; positions through a layer).
    """

    threshold: float | None
    tokens_per_s: float
    speed_up: float
    exit_shares: dict[str, float]
    agreement: float
    identical: float
    layer_passes: float
    layer_executions: float


@dataclass
class _Runs:
    """All runs of one row: times of every round, results of the first (greedy decoding repeats itself)."""

    results: list[Result] = field(default_factory=list)
    seconds_per_token: list[float] = field(default_factory=list)

    def total(self, of: Callable[[Result], int]) -> int:
        return sum(map(of, self.results))


def agreement(engine: Engine, prompt_ids: Sequence[int], emitted_ids: Sequence[int]) -> float:
    """Share of the emitted tokens that equal the full model's greedy choice on the same prefix."""
    ids = [*prompt_ids, *emitted_ids]
    choices = engine.choices(ids[:-1], start=len(prompt_ids))
    return sum(a == b for a, b in zip(choices, emitted_ids, strict=True)) / len(emitted_ids)


def compare_thresholds(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    max_new_tokens: int,
    repeats: int = 3,
    exit_layers: tuple[int, ...] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Generate from every prompt with the full model and at each threshold, alternating, `repeats` times.

    Returns the full model's row, then one per threshold in the order given. `on_progress` is told (runs done, runs
    in all). Raises ConfigError as `Engine.stream` does.
    """
    params = SamplingParams(max_new_tokens=max_new_tokens)
    policies = [None, *(ConfidencePolicy(threshold, exit_layers) for threshold in thresholds)]
    runs = [_Runs() for _ in policies]
    for prompt in prompts[:1]:  # first calls pay for what later ones find in caches
        for policy in policies:
            engine.generate(prompt, params, policy)
    done, total = 0, repeats * len(prompts) * len(policies)
    for repeat in range(repeats):
        for prompt in prompts:
            for policy, run in zip(policies, runs, strict=True):
                result = engine.generate(prompt, params, policy)
                run.seconds_per_token.append(result.seconds / len(result.tokens))
                if repeat == 0:
                    run.results.append(result)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
    return [
        _row(engine, prompts, threshold, run, runs[0]) for threshold, run in zip([None, *thresholds], runs, strict=True)
    ]


def _row(
    engine: Engine, prompts: Sequence[Sequence[int]], threshold: float | None, run: _Runs, full: _Runs
) -> Comparison:
    tokens = [token for result in run.results for token in result.tokens]
    count = Counter(token.exit for token in tokens)
    agreed = sum(
        agreement(engine, prompt, result.ids) * len(result.ids)
        for prompt, result in zip(prompts, run.results, strict=True)
    )
    seconds = median(run.seconds_per_token)
    same = sum(ours.ids == theirs.ids for ours, theirs in zip(run.results, full.results, strict=True))
    full_tokens = full.total(lambda result: len(result.tokens))

    def per_token(of: Callable[[Result], int]) -> float:
        return run.total(of) / len(tokens) / (full.total(of) / full_tokens)

    return Comparison(
        threshold=threshold,
        tokens_per_s=1 / seconds,
        speed_up=median(full.seconds_per_token) / seconds,
        exit_shares={head: count[head] / len(tokens) for head in engine.model.head_labels()},
        agreement=agreed / len(tokens),
        identical=same / len(prompts),
        layer_passes=per_token(lambda result: result.layer_passes),
        layer_executions=per_token(lambda result: result.layer_executions),
    )


def as_table(rows: Sequence[Comparison]) -> str:
    """The rows as aligned text, for a terminal or a README."""
    heads = list(rows[0].exit_shares)
    shares = [f"exit {head}" if head != FINAL else FINAL for head in heads]
    titles = ["threshold", "tokens/s", "speed-up", *shares, "agreement", "identical", "layer passes"]
    cells = [titles]
    for row in rows:
        cells.append(
            [
                "full model" if row.threshold is None else f"{row.threshold:g}",
                f"{row.tokens_per_s:.0f}",
                f"{row.speed_up:.2f}x",
                *(f"{row.exit_shares[head]:.0%}" for head in heads),
                f"{row.agreement:.1%}",
                f"{row.identical:.0%}",
                f"{row.layer_passes:.0%}",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
