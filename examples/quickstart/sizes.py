"""How large a model and how much text suit the minutes and the machine there are, as flags for the training program.

The numbers were found by trying: what reads best after the given minutes, still gains from its depth, and is sure of
many tokens at its exits. In five minutes on two cores one million parameters get further than two or ten million do.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """What a run is made of. `iterations`, `threads` and `bf16` are filled in once the speed is measured."""

    minutes: float
    megabytes: float
    vocab_size: int
    num_layers: int
    hidden_size: int
    seq_length: int
    batch_size: int
    lr: float
    head_dim: int = 32
    max_passes: float = 8.0
    evaluations: int = 6
    eval_batches: int = 16
    prompts: int = 12
    iterations: int = 0
    threads: int = 0
    bf16: bool = False

    @property
    def exit_layers(self) -> tuple[int, int]:
        """A quarter and a half of the depth."""
        return self.num_layers // 4, self.num_layers // 2

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_length

    def training_flags(self) -> list[str]:
        """Everything that decides the result but the data."""
        return self._model_flags() + self._optimizer_flags()

    def _model_flags(self) -> list[str]:
        """A small GPT with two exits, each with a norm of its own; all heads share the word embedding.

        LayerNorm, because torch has no fused RMSNorm for CPUs. A first exit that counts thrice agrees with the whole
        model far more often, and costs that next to nothing.
        """
        return [
            *("--num-layers", str(self.num_layers), "--hidden-size", str(self.hidden_size)),
            *("--num-attention-heads", str(self.hidden_size // self.head_dim), "--seq-length", str(self.seq_length)),
            *("--ffn-hidden-size", str(5 * self.hidden_size // 2), "--swiglu", "--disable-bias-linear"),
            *("--position-embedding-type", "rope"),
            *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", f"{self.init_std:.3f}"),
            *("--exit-layer-nums", *map(str, self.exit_layers), "--exit-norm", "own"),
            *("--exit-layer-weight", "3.0", "1.0"),
            *(("--bf16",) if self.bf16 else ()),
        ]

    @property
    def init_std(self) -> float:
        """0.02 at a width of 625: a narrow model that starts there, too, spends many tokens on growing its weights."""
        return 0.5 * self.hidden_size**-0.5

    def _optimizer_flags(self) -> list[str]:
        """AdamW with a short warm-up and a cosine down to a fiftieth, over exactly this run's length."""
        return [
            *("--micro-batch-size", str(self.batch_size), "--train-iters", str(self.iterations)),
            *("--lr", f"{self.lr:g}", "--min-lr", f"{self.lr / 50:g}", "--lr-decay-style", "cosine"),
            *("--lr-warmup-iters", str(min(100, self.iterations // 10)), "--adam-beta2", "0.95"),
            *("--weight-decay", "0.1", "--clip-grad", "1.0"),
        ]


SMALL = Plan(
    minutes=5, megabytes=12, vocab_size=2048, num_layers=16, hidden_size=64, seq_length=128, batch_size=12, lr=1.2e-2
)
QUICK = replace(
    SMALL, minutes=0.4, megabytes=2, vocab_size=1024, num_layers=8, evaluations=2, eval_batches=8, prompts=4
)
MEDIUM = replace(
    SMALL, megabytes=28, vocab_size=4096, hidden_size=128, seq_length=256, batch_size=8, lr=5e-3, max_passes=6.0
)
GPU = replace(
    SMALL, megabytes=100, vocab_size=8192, hidden_size=512, head_dim=64, seq_length=512, batch_size=64, lr=1e-3,
    max_passes=5.0,
)  # fmt: skip
MEDIUM_FROM_MINUTES = 20


def choose(minutes: float | None, quick: bool, gpu: bool) -> Plan:
    """The plan for the wish (`None`: five minutes) and the machine; `iterations` are still 0."""
    if quick:
        return QUICK
    minutes = SMALL.minutes if minutes is None else minutes
    if gpu:
        return replace(GPU, minutes=minutes)
    return replace(MEDIUM if minutes >= MEDIUM_FROM_MINUTES else SMALL, minutes=minutes)


def fit(plan: Plan, tokens_per_s: float, corpus_tokens: int) -> int:
    """Iterations for the plan's minutes at the measured speed, as a multiple of the number of evaluations.

    A fast machine ends sooner: more than `max_passes` over the text would be learnt by heart.
    """
    # Evaluation reads without learning, at about three times the speed; the rest is starting and saving.
    reading = plan.evaluations * plan.eval_batches * plan.tokens_per_iteration / (3 * tokens_per_s)
    seconds = max(0.5 * plan.minutes * 60, 0.98 * plan.minutes * 60 - reading)
    tokens = min(seconds * tokens_per_s, plan.max_passes * corpus_tokens)
    rounds = max(5, int(tokens / plan.tokens_per_iteration / plan.evaluations))
    return rounds * plan.evaluations
