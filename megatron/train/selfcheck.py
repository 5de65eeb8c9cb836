"""One step of a toy model in any layout, and how it differs from the same step in one process."""

import math
from dataclasses import dataclass
from itertools import product

import torch

from megatron.config.load import load
from megatron.config.run import RunConfig
from megatron.data.loader import Microbatch, make_microbatch
from megatron.model.init import initialise
from megatron.model.names import named_parts
from megatron.parallel.mesh import Mesh
from megatron.parallel.placement import Placed
from megatron.parallel.rng import generator
from megatron.train.build import build_trainer
from megatron.train.step import train_step
from megatron.train.trainer import Trainer

# How far a gradient may be off: of fp32, sums in another order; of bf16, some of its 8 bits as well.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1")
_MOST_WAYS = 8  # along tp and pp: what is wrong with 16 is wrong with 8


@dataclass(frozen=True)
class Layout:
    """How a step is spread over ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence: bool = False
    sharded: bool = False
    schedule: str = "1f1b"

    def flags(self, num_layers: int) -> list[str]:
        """What the training program would be told, for a model of so many layers."""
        words = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        words += ["--sequence-parallel"] if self.sequence else []
        words += ["--use-distributed-optimizer"] if self.sharded else []
        words += ["--pipeline-schedule", self.schedule]
        if self.schedule == "interleaved":
            words += ["--num-layers-per-virtual-pipeline-stage", str(num_layers // (2 * self.pp))]
        return words

    def describe(self) -> str:
        """In words, for tables and messages."""
        words = [f"tp={self.tp} pp={self.pp} dp={self.dp}"]
        words += [self.schedule] if self.pp > 1 else []
        words += ["sequence parallel"] if self.sequence else []
        words += ["distributed optimizer"] if self.sharded else []
        return ", ".join(words)


def layouts(world: int, node: int) -> list[Layout]:
    """All layouts of so many ranks, `node` of them on a machine, which tp doesn't leave.

    In such an order that the first few try every size of every axis, then every schedule: time may not do for all.
    """
    sizes = [
        (tp, pp, world // (tp * pp)) for tp, pp in product(_divisors(node), _divisors(world)) if world % (tp * pp) == 0
    ]
    variants = [_variants(number, *size) for number, size in enumerate(sizes)]
    return [column[turn] for turn in range(max(map(len, variants))) for column in variants if turn < len(column)]


def _variants(number: int, tp: int, pp: int, dp: int) -> list[Layout]:
    """Everything that may be switched in a layout; which comes first differs from layout to layout."""
    first = number % len(_SCHEDULES)
    schedules = (*_SCHEDULES[first:], *_SCHEDULES[:first]) if pp > 1 else _SCHEDULES[:1]
    switches = product((True, False) if tp > 1 else (False,), (True, False) if dp > 1 else (False,), schedules)
    return [Layout(tp, pp, dp, *switched) for switched in switches]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, _MOST_WAYS) + 1) if number % n == 0]


def toy_config(world: int, node: int, layout: Layout) -> RunConfig:
    """A toy run that every layout of the world divides; the same model and batch for all of them."""
    layers, heads = 2 * math.lcm(2, *_divisors(world)), math.lcm(4, *_divisors(node))
    words = (
        f"--num-layers {layers} --hidden-size {8 * heads} --num-attention-heads {heads} --seq-length {4 * heads} "
        f"--tokenizer-type NullTokenizer --vocab-size {16 * heads - 4} --padded-vocab-size {16 * heads} "
        f"--exit-layer-nums 1 {layers // 2 + 1} --exit-layer-weight 0.25 0.5 --use-exit-norm --init-method-std 0.1 "
        "--attention-dropout 0 --hidden-dropout 0 --data-path none --train-iters 10 --lr 1e-2 --clip-grad 0 "
        f"--micro-batch-size 1 --global-batch-size {world * math.ceil(8 / world)}"
    )
    return load([*words.split(), *layout.flags(layers)]).config


@dataclass
class ToyStep:
    """Losses and gradient norm of a step, and this rank's parts of the gradients by checkpoint name."""

    losses: dict[str, float]
    grad_norm: float
    gradients: dict[str, Placed]


def toy_step(config: RunConfig, dtype: torch.dtype, mesh: Mesh) -> ToyStep:
    """One step from initial values and on a batch that are the same in every layout. Every rank must call this."""
    trainer = build_trainer(config, dtype=dtype, mesh=mesh)
    initialise_all(trainer, config.training.seed)
    report = train_step(trainer, _batches(trainer))
    return ToyStep(report.losses, report.grad_norm, gradient_parts(trainer))


def initialise_all(trainer: Trainer, seed: int) -> None:
    """Initial values, of norms and biases ones at random, too: were they all 0 or 1, mistakes could cancel."""
    initialise(trainer.model, seed, trainer.vocab_size)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            for part, placed in named_parts(name, parameter.detach(), trainer.model, trainer.vocab_size):
                if parameter.dim() == 1:
                    noise = 0.1 * torch.randn(placed.shape, generator=generator(seed, "noise", part))
                    placed.view.add_(placed.of(noise).to(placed.view))
    trainer.optimizer.reset_masters()


def gradient_parts(trainer: Trainer) -> dict[str, Placed]:
    """By checkpoint name: this rank's part of the summed gradients, as the last step left them."""
    optimizer = trainer.optimizer
    return {
        part: placed._replace(view=placed.view.clone())
        for name, parameter in optimizer.parameters.items()
        for part, placed in named_parts(
            name, optimizer.sync.own(parameter.main_grad), trainer.model, trainer.vocab_size, optimizer.first_row(name)
        )
    }


def _batches(trainer: Trainer) -> list[Microbatch]:
    """This data-parallel rank's share of the toy batch."""
    config, mesh = trainer.config, trainer.mesh
    dp, length = mesh.size("dp"), config.model.seq_length
    count = config.training.global_batch_size // dp
    return [
        make_microbatch(
            torch.randint(
                trainer.vocab_size, (1, length + 1), generator=generator(1, "toy batch", m * dp + mesh.rank("dp"))
            ).to(mesh.backend.device),
            eod=0,
        )
        for m in range(count)
    ]


@dataclass(frozen=True, order=True)
class Difference:
    """How far something of a step is off, as a share of its size, and what it is."""

    error: float
    what: str


def worst_difference(found: ToyStep, alone: ToyStep) -> Difference:
    """What differs most from the step in one process: a loss, the gradient norm, or this rank's part of a gradient.

    A gradient's difference is a share of its part's norm, or of a thousandth of the whole gradient's norm where that
    is more: some gradients are zero but for rounding. What isn't finite is infinitely wrong.
    """
    numbers = {"gradient norm": (found.grad_norm, alone.grad_norm)}
    for label, loss in alone.losses.items():
        numbers[f"loss of head {label}"] = found.losses.get(label, math.nan), loss
    differences = [Difference(_finite(abs(a - b) / abs(b)), what) for what, (a, b) in numbers.items()]
    for name, part in found.gradients.items():
        expected = part.of(alone.gradients[name].view).double()
        size = max(float(expected.norm()), 1e-3 * alone.grad_norm)
        error = float((part.view.double() - expected).norm()) / size
        differences.append(Difference(_finite(error), f"gradient of {name}"))
    return max(differences)


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf
