"""How large a model and how much text suit the minutes and the machine there are, as flags for the training program.

The numbers were found by trying: in a short time a small model that sees much text reads better than a large one that
sees little, and is sooner worth its depth.
"""

from dataclasses import dataclass, replace

LEAST_TOKENS = 2_500_000  # below, texts are not worth reading, however small the model
TOKENS_PER_PARAMETER = 2.5
WIDTHS = (64, 96, 128, 192, 256, 384)  # to choose from where the first is trained faster than need be
HEAD_WIDTH = 32


@dataclass(frozen=True)
class Plan:
    """What a run is made of. The last four are filled in once the speed is measured."""

    minutes: float
    megabytes: float
    vocab_size: int
    num_layers: int
    hidden_size: int
    seq_length: int
    batch_size: int
    lr: float
    may_grow: bool = True
    max_passes: float = 6.0
    evaluations: int = 8
    eval_batches: int = 24
    prompts: int = 10
    iterations: int = 0
    tokens_per_s: float = 0.0
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

    @property
    def ffn_size(self) -> int:
        """Width of the gated MLP."""
        return 3 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Weights of the matrices, with one word embedding for input and all heads."""
        width = self.hidden_size
        return self.num_layers * (4 * width**2 + 3 * width * self.ffn_size) + self.vocab_size * width

    @property
    def flops_per_token(self) -> int:
        """Work of training on one token: layers and their attention, and three heads."""
        heads = 3 * self.vocab_size * self.hidden_size
        attention = self.num_layers * 2 * self.seq_length * self.hidden_size
        return 6 * (self.parameters - self.vocab_size * self.hidden_size + heads + attention)

    def training_flags(self) -> list[str]:
        """Everything that decides the result but the data."""
        return self._model_flags() + self._optimizer_flags()

    def _model_flags(self) -> list[str]:
        """A small Llama with two exits, each with a norm of its own; all heads share the word embedding."""
        return [
            *("--num-layers", str(self.num_layers), "--hidden-size", str(self.hidden_size)),
            *("--num-attention-heads", str(self.hidden_size // HEAD_WIDTH), "--seq-length", str(self.seq_length)),
            *("--ffn-hidden-size", str(self.ffn_size), "--swiglu", "--normalization", "RMSNorm"),
            *("--position-embedding-type", "rope", "--disable-bias-linear"),
            *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", f"{self.init_std:.3f}"),
            *("--exit-layer-nums", *map(str, self.exit_layers), "--exit-norm", "own"),
            *("--exit-layer-weight", "1.0", "0.7"),
            *(("--bf16",) if self.bf16 else ()),
        ]

    @property
    def init_std(self) -> float:
        """A narrow model that starts at the usual 0.02 spends its first million tokens on growing its weights."""
        return 0.6 * self.hidden_size**-0.5

    def _optimizer_flags(self) -> list[str]:
        """AdamW with a short warm-up and a cosine down to a fiftieth, over exactly this run's length."""
        return [
            *("--micro-batch-size", str(self.batch_size), "--train-iters", str(self.iterations)),
            *("--lr", f"{self.lr:g}", "--min-lr", f"{self.lr / 50:g}", "--lr-decay-style", "cosine"),
            *("--lr-warmup-iters", str(min(60, self.iterations // 10)), "--adam-beta2", "0.98"),
            *("--weight-decay", "0.1", "--clip-grad", "1.0"),
        ]


SMALL = Plan(
    minutes=5, megabytes=12, vocab_size=2048, num_layers=12, hidden_size=64, seq_length=128, batch_size=8, lr=4e-3
)
QUICK = replace(
    SMALL, minutes=0.4, megabytes=2, vocab_size=1024, num_layers=8, may_grow=False, evaluations=2, eval_batches=8,
    prompts=4,
)  # fmt: skip
LONG = replace(SMALL, megabytes=28, vocab_size=4096, seq_length=256, lr=3e-3)
LONG_FROM_MINUTES = 20
GPU = replace(
    SMALL, megabytes=100, vocab_size=8192, hidden_size=512, seq_length=512, batch_size=32, lr=1e-3, may_grow=False
)


def choose(minutes: float | None, quick: bool, gpu: bool) -> Plan:
    """The plan for the wish (`None`: five minutes) and the machine; `iterations` are still 0."""
    if quick:
        return QUICK
    minutes = SMALL.minutes if minutes is None else minutes
    if gpu:
        return replace(GPU, minutes=minutes)
    return replace(LONG if minutes >= LONG_FROM_MINUTES else SMALL, minutes=minutes)


def grow(plan: Plan) -> Plan:
    """The widest model that still sees enough text in its time, judged from the measured speed of `plan`."""
    if not plan.may_grow:
        return plan

    def sees_enough(width: int) -> bool:
        wider = replace(plan, hidden_size=width)
        tokens = 60 * plan.minutes * plan.tokens_per_s * plan.flops_per_token / wider.flops_per_token
        return tokens >= max(LEAST_TOKENS, TOKENS_PER_PARAMETER * wider.parameters)

    width = max(filter(sees_enough, WIDTHS), default=plan.hidden_size)
    # Adam's steps suit a width: what is wider takes smaller ones.
    return replace(plan, hidden_size=width, lr=plan.lr * (plan.hidden_size / width) ** 0.5)


def iterations(plan: Plan, minutes: float, corpus_tokens: int) -> int:
    """How many fit into `minutes` at the measured speed, as a multiple of the number of evaluations.

    A fast machine ends sooner: more than `max_passes` over the text would be learnt by heart.
    """
    # Evaluation reads without learning, at about three times the speed; the rest is starting and saving.
    reading = plan.evaluations * plan.eval_batches * plan.tokens_per_iteration / (3 * plan.tokens_per_s)
    seconds = max(0.5 * minutes * 60, 0.97 * minutes * 60 - reading)
    tokens = min(seconds * plan.tokens_per_s, plan.max_passes * corpus_tokens)
    rounds = max(5, int(tokens / plan.tokens_per_iteration / plan.evaluations))
    return rounds * plan.evaluations
