"""What a microbatch keeps between forward and backward, and what heads and backward need while they run. No torch.

The terms are those of autograd on the modules of `nn`, `exits` and `model`: a test holds each against the tensors that
autograd saves. torch.compile and masks (windows shorter than the sequence, documents kept apart) are left out.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.training import TrainingConfig
from megatron.model.partition import StageSpec, segments

# As nn.cross_entropy has them: logits that are held at once.
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


@dataclass(frozen=True)
class Activations:
    """Bytes of tensors on one rank, for one microbatch of `micro_batch` sequences. elements: bytes of one."""

    model: ModelConfig
    padded_vocab_size: int
    micro_batch: int
    tp: int = 1
    sequence_parallel: bool = False
    elements: int = 2
    kind: Literal["cpu", "cuda"] = "cuda"

    @property
    def tokens(self) -> int:
        """Positions inside a tensor-parallel region: all of the microbatch."""
        return self.micro_batch * self.model.seq_length

    @property
    def positions(self) -> int:
        """Positions between regions: with sequence parallelism this rank's."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def hidden(self) -> int:
        """A hidden state between regions: what crosses a stage's border, too."""
        return self.positions * self.model.hidden_size * self.elements

    @property
    def keeps_norm_inputs(self) -> bool:
        """Whether a norm keeps its input: RMSNorm on CPUs keeps what it made of it instead."""
        return not (self.kind == "cpu" and self.model.normalization == "RMSNorm")

    def norm(self, rows: int | None = None, width: int | None = None) -> int:
        """What a norm over `rows` of `width` keeps beside its input and output."""
        rows, width = rows or self.positions, width or self.model.hidden_size
        if self.model.normalization == "LayerNorm":
            return 2 * rows * (4 if self.kind == "cuda" else self.elements)
        if self.kind == "cuda":
            return rows * 4
        return rows * 4 + rows * width * 4 * (1 if self.elements == 4 else 2)

    def layer(self, selective: bool = False) -> int:
        """What a layer keeps beside its input and output. selective: attention's core is recomputed."""
        between = self.hidden if self.keeps_norm_inputs else 0
        return 2 * (self.norm() + self.hidden + self._dropped()) + between + self._attention(selective) + self._mlp()

    def branch(self) -> int:
        """What an exit's MLP keeps beside its inputs."""
        return self._mlp() + self._dropped()

    def forward(self, stage: StageSpec, training: TrainingConfig) -> int:
        """What F keeps for E and B of a stage, whose output goes on: of a frozen backbone the taps alone."""
        if stage.stop is not None:
            taps = sum(2 if spec.tap == "mlp" else 1 for spec in stage.exits)
            return taps * self.hidden + self._tables()
        selective = training.recompute_granularity == "selective"
        spans = segments(stage, training)
        kept = sum((last - first) * self.layer(selective) for first, last, recompute in spans if not recompute)
        kept += (len(self._borders(stage, training)) + self._branching(stage, training)) * self.hidden + self._tables()
        return kept + (self._embedding() if stage.is_first else 0)

    def again(self, stage: StageSpec, training: TrainingConfig) -> int:
        """What B recomputes at a time."""
        if training.recompute_granularity == "selective":
            return self._core()
        longest = max((last - first for first, last, recompute in segments(stage, training) if recompute), default=0)
        return longest * (self.layer() + self.hidden * self.keeps_norm_inputs)

    def backward(self, stage: StageSpec, training: TrainingConfig) -> int:
        """What B needs beside what is kept, at its start: gradients of the last layer's tensors."""
        if stage.stop is not None:
            return 0
        wide = self._inner() * (3 if self.model.gated else 1)
        matrix = self.model.hidden_size * self.model.ffn_size // self.tp * self.elements
        return self.again(stage, training) + 2 * self.hidden + wide + matrix

    def heads(self, stage: StageSpec, exits: ExitConfig) -> tuple[int, int]:
        """(peak, left): what E needs at most beside what is kept, and the gradients that it leaves for B."""
        left = peak = 0
        for _ in stage.exits:
            peak = max(peak, left + self._features(exits) + self._loss())
            left += self.hidden * (2 if exits.use_exit_mlp else 1) if stage.stop is None else 0
        if stage.stop is not None:
            return peak, 0
        if stage.is_last:
            peak = max(peak, left + self.norm() + self.hidden + self._loss())
            left += self.hidden
        return max(peak, left), left

    def _attention(self, selective: bool) -> int:
        """Queries, keys and values, and what the core makes of them; its output is what the projection takes."""
        model, e, n = self.model, self.elements, self.tokens
        heads, kv, d = model.num_attention_heads // self.tp, model.num_kv_heads // self.tp, model.head_dim
        rows, turned = (heads + 2 * kv) * d, (heads + kv) * d
        moved = model.position_embedding_type == "rope" or model.qk_layernorm
        copied = heads * d if kv < heads else 0  # grouped queries are no view
        statistics = self.norm(n * (heads + kv), d) if model.qk_layernorm else 0
        output = n * heads * d * e
        if self._plain and not selective:
            keeps_rows = (kv == heads and e == 4) or (model.qk_layernorm and self.keeps_norm_inputs)
            return self._core() + n * rows * e * keeps_rows + statistics + output
        return n * (rows + turned * moved + copied) * e + statistics + output + (0 if selective else self._core())

    def _core(self) -> int:
        """What attention's core keeps beside queries, keys, values and output."""
        model, n = self.model, self.tokens
        heads, kv, d = model.num_attention_heads // self.tp, model.num_kv_heads // self.tp, model.head_dim
        if not self._plain:
            return n * heads * 4
        copies = 2 if kv == heads and self.elements == 4 else 3
        return copies * n * heads * d * 4 + 3 * n * model.seq_length * heads * 4

    @property
    def _plain(self) -> bool:
        """Whether attention runs step by step, as with dropout on CPUs; otherwise one kernel does it all."""
        return self.kind == "cpu" and self.model.attention_dropout > 0

    def _inner(self) -> int:
        return self.tokens * self.model.ffn_size // self.tp * self.elements

    def _mlp(self) -> int:
        """Before and after the activation; a gate whose product isn't one function with it keeps its own."""
        gated, silu = self.model.gated, self.model.activation == "silu"
        return self._inner() * (2 if not gated else 3 if silu else 4)

    def _dropped(self) -> int:
        """Where dropout struck."""
        if self.model.hidden_dropout == 0:
            return 0
        return self.positions * self.model.hidden_size * (1 if self.kind == "cuda" else self.elements)

    def _embedding(self) -> int:
        """Ids, with tensor parallelism which of them are here, and dropout."""
        return self.tokens * (8 if self.tp == 1 else 9) + self._dropped()

    def _tables(self) -> int:
        if self.model.position_embedding_type != "rope":
            return 0
        return 2 * self.model.seq_length * int(self.model.head_dim * self.model.rotary_percent) * self.elements

    def _borders(self, stage: StageSpec, training: TrainingConfig) -> set[int]:
        """Before which layers the hidden state is kept: for norms, for recomputing, for exits, as a message."""
        kept = ({stage.last} if stage.is_last else set()) | (set() if stage.is_first else {stage.first})
        for first, last, recompute in segments(stage, training):
            kept |= {first} if recompute else set(range(first, last)) if self.keeps_norm_inputs else set()
        return kept | {spec.layer + (spec.tap == "output") for spec in stage.exits if spec.tap != "mlp"}

    def _branching(self, stage: StageSpec, training: TrainingConfig) -> int:
        """Inputs of exits' MLPs that nothing else keeps, in hidden states."""
        again = {i for first, last, recompute in segments(stage, training) if recompute for i in range(first, last)}
        branches = [spec.layer for spec in stage.exits if spec.tap == "mlp"]
        return sum(2 if layer in again else int(not self.keeps_norm_inputs) for layer in branches)

    def _features(self, exits: ExitConfig) -> int:
        """What an exit makes between its tap and its output matrix."""
        made = (self.branch() + self.hidden) if exits.use_exit_mlp else 0
        made += (self.layer() + self.hidden) if exits.use_exit_block else 0
        return made + (0 if exits.exit_norm == "none" else self.norm() + self.hidden)

    def _loss(self) -> int:
        """A chunk of logits, the gradient of what they came from, and a product on its way into a wider buffer."""
        rows = self.padded_vocab_size // self.tp
        chunk = min(self.tokens, max(1, MAX_LOGITS[self.kind] // rows)) * rows * (4 if self.elements == 4 else 6)
        whole = self.tokens * self.model.hidden_size * self.elements
        product = rows * self.model.hidden_size * self.elements if self.elements < 4 else 0
        return chunk + product + whole * (2 if self.sequence_parallel else 1)
