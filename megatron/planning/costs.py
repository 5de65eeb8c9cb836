"""What one microbatch costs on each stage: the numbers by which schedules are simulated and layers balanced. No torch.

Times follow from FLOPs and from the bytes that tensor-parallel ranks exchange. Without a device the unit of time is one
FLOP and communication is free, so that ratios are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.training import TrainingConfig
from megatron.model.partition import StageSpec, segments
from megatron.planning.device import Device
from megatron.planning.flops import attention_flops, head_flops, layer_flops, mlp_flops
from megatron.schedule.simulate import Costs


@dataclass(frozen=True)
class Passes:
    """Times of a part of the model for one microbatch: forward, and the two halves of backward."""

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return self.forward + self.input + self.weight

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.input + other.input, self.weight + other.weight)

    def times(self, factor: float) -> "Passes":
        """So many of them."""
        return Passes(self.forward * factor, self.input * factor, self.weight * factor)


def stage_costs(  # noqa: PLR0913 - one keyword per thing that changes a cost
    model: ModelConfig,
    exits: ExitConfig,
    stages: Sequence[StageSpec],
    padded_vocab_size: int,
    tokens: int,
    device: Device | None = None,
    *,
    tp: int = 1,
    dp: int = 1,
    sequence_parallel: bool = False,
    training: TrainingConfig | None = None,
    element_bytes: int = 2,
) -> tuple[Costs, ...]:
    """The times of each stage for one microbatch of so many `tokens`; memory is `planning.memory`'s.

    stages: of the whole model, in order. dp: how far away the next stage's ranks are. training: its recompute flags
    make backward longer. element_bytes: of a hidden state's elements. Seconds with a device, else FLOPs per
    tensor-parallel rank.
    """
    clock = Clock(model, padded_vocab_size, tokens, device, tp, dp, sequence_parallel, element_bytes)
    training = training or TrainingConfig()
    return tuple(_stage(clock, exits, stage, training) for stage in stages)


def _stage(clock: "Clock", exits: ExitConfig, stage: StageSpec, training: TrainingConfig) -> Costs:
    layer = clock.layer()
    body = layer.times(stage.until - stage.first)
    again = 0.0
    if training.recompute_granularity == "selective":
        again = (stage.until - stage.first) * clock.attention()
    again += sum((last - first) * layer.forward for first, last, recompute in segments(stage, training) if recompute)
    heads = sum((clock.exit(exits).total for _ in stage.exits), 0.0)
    if stage.has_final:
        heads += clock.head().total
    if stage.stop is not None:  # a frozen backbone has no backward pass
        body, again = replace(body, input=0.0, weight=0.0), 0.0
    return Costs(
        forward=body.forward + (clock.embedding() if stage.is_first else 0.0),
        heads=heads,
        input=body.input + again,
        weight=body.weight,
        message=clock.message(),
    )


@dataclass(frozen=True)
class Clock:
    """Times of a model's parts for one microbatch on one rank of a tensor-parallel group."""

    model: ModelConfig
    padded_vocab_size: int
    tokens: int
    device: Device | None = None
    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    element_bytes: int = 2

    def layer(self) -> Passes:
        """A transformer layer: each product has two in the backward pass, of which those of matrices can wait."""
        whole = layer_flops(self.model, self.model.seq_length)
        attention = attention_flops(self.model, self.model.seq_length)
        matrices = whole - attention
        # per region, of which attention and MLP are one each: into it and out of it
        regions = Passes(2 * self._region_forward(), 2 * self._region_input(), 2 * self._region_weight())
        found = Passes(self._work(whole), self._work(matrices + 2 * attention), self._work(matrices))
        if self._measured:
            forward, backward = (self._tokens_of(name) for name in ("layer_forward", "layer_backward"))
            share = found.weight / (found.input + found.weight)
            found = Passes(forward, backward * (1 - share), backward * share)
        return found + regions

    def attention(self) -> float:
        """The core of attention, forward: what selective recompute repeats."""
        return self._part_of_layer(attention_flops(self.model, self.model.seq_length))

    def branch(self) -> Passes:
        """An exit's MLP."""
        once = self._part_of_layer(mlp_flops(self.model))
        region = Passes(self._region_forward(), self._region_input(), self._region_weight())
        return Passes(once, once, once) + region

    def head(self) -> Passes:
        """An output matrix with its loss: logits, and the gradients of its input and of the matrix."""
        once = self._work(head_flops(self.model, self.padded_vocab_size))
        if self._measured:
            once = self._tokens_of("head") / 3
        return Passes(once + self._gather(), once + self._reduce(), once)

    def exit(self, exits: ExitConfig) -> Passes:
        """A whole exit: branch, block and output matrix, as far as it has them."""
        found = self.head()
        if exits.use_exit_mlp:
            found += self.branch()
        if exits.use_exit_block:
            found += self.layer()
        return found

    def embedding(self) -> float:
        """The sum over ranks that each have some rows of the table."""
        return self._reduce()

    def message(self) -> float:
        """A hidden state to the next stage."""
        if self.device is None:
            return 0.0
        share = self.tp if self.sequence_parallel else 1
        return self._bytes / share / self.device.link("pp", 2 * self.tp * self.dp)

    @property
    def _bytes(self) -> float:
        """Of a whole hidden state."""
        return self.tokens * self.model.hidden_size * self.element_bytes

    def _work(self, flops_per_token: float) -> float:
        rate = 1.0 if self.device is None else self.device.flops_per_s
        return self.tokens * flops_per_token / self.tp / rate

    @property
    def _measured(self) -> bool:
        return self.device is not None and bool(self.device.actions)

    def _tokens_of(self, action: str) -> float:
        """A measured time per token, for a rank's share of the microbatch."""
        return self.tokens * self.device.actions[action] / self.tp

    def _part_of_layer(self, flops_per_token: float) -> float:
        """Work that goes at a layer's pace."""
        if not self._measured:
            return self._work(flops_per_token)
        return self._tokens_of("layer_forward") * flops_per_token / layer_flops(self.model, self.model.seq_length)

    def _half(self) -> float:
        """Time of a gather or a reduce-scatter of a hidden state: half of a ring's all-reduce."""
        if self.device is None or self.tp == 1:
            return 0.0
        return self._bytes * (self.tp - 1) / self.tp / self.device.link("tp", self.tp)

    def _gather(self) -> float:
        return self._half() if self.sequence_parallel else 0.0

    def _reduce(self) -> float:
        return self._half() if self.sequence_parallel else 2 * self._half()

    def _region_forward(self) -> float:
        return self._gather() + self._reduce()

    def _region_input(self) -> float:
        """Gradients enter a region where it was left; their sum over ranks hides behind the matrices' gradients."""
        return self._gather()

    def _region_weight(self) -> float:
        """Under sequence parallelism the kept part of the input is gathered once more."""
        return self._gather()
