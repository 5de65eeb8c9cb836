"""The planner's predictions against real runs: memory and order of actions of six layouts, time of one process.

Memory is the peak of fresh processes less what they take for a toy model, against the prediction for CPUs in fp32.
Time: a layer's and a head's are measured on small models; what they predict for a larger one is compared with it.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from report import Figure, alternate, arguments, finish

from megatron.config.load import load
from megatron.parallel.backend import Backend
from megatron.planning.device import Device
from megatron.planning.estimate import Estimate, Setup, estimate
from megatron.testing.rank_memory import measure_in_fresh_processes
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.step import train_step

LAYOUTS = {
    "pp=2": "--pipeline-model-parallel-size 2",
    "pp=2, 3 and 5 layers": "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|t*5L",
    "tp=2": "--tensor-model-parallel-size 2",
    "tp=2, sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "dp=2, distributed optimizer": "--use-distributed-optimizer",
    "pp=2, full recompute": "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
}
DEVICE = Device("CPU core", 1e10, 8e9, 1e10, 1e9, 1e9, 1, "cpu")


def flags(layers: int, exits: str, batch: int, sizes: str) -> list[str]:
    """A Llama of width 256 without dropout."""
    text = (
        f"--num-layers {layers} {sizes} --micro-batch-size {batch} --global-batch-size {4 * batch} "
        "--num-attention-heads 8 --normalization RMSNorm --swiglu --use-rotary-position-embeddings "
        "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
        f"--train-iters 9 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 8191 --data-path none {exits}"
    )
    return text.split()


def predicted(words: list[str], ranks: int, device: Device = DEVICE) -> Estimate:
    """What the planner says."""
    return estimate(Setup(load(words).config, ranks, 8192, device))


def memory_figures(sizes: str, batch: int) -> list[Figure]:
    """Measured over predicted, the rank that is furthest off; and whether every rank did what was planned, in order."""
    figures, right = [], []
    for name, layout in LAYOUTS.items():
        words = [*flags(8, "--exit-layer-nums 2 4", batch, sizes), *layout.split()]
        plan, found = predicted(words, 2), measure_in_fresh_processes(words, 2)
        off = [rank.peak / plan.ranks[rank.pp].memory for rank in found]
        spans = plan.timeline.spans
        right += [rank.actions == tuple(str(span.action) for span in spans[rank.pp]) for rank in found]
        figures.append(Figure(f"{name}: peak memory / predicted", max(off, key=lambda ratio: abs(ratio - 1)), "x"))
    furthest = max(abs(figure.value - 1) for figure in figures)
    return [
        *figures,
        Figure("memory of six layouts: furthest off by", furthest, "", 0.10, at_least=False),
        Figure("ranks that did what was planned, in order", sum(right) / len(right), "", 1.0),
    ]


def step_of(words: list[str]) -> Callable[[], None]:
    """A training step in this process."""
    config = load(words).config
    trainer = build_trainer(config, Backend.choose("gloo"))
    checkpoints.start(trainer)
    micro, length = config.training.micro_batch_size, config.model.seq_length
    batches = [random_batch(micro, length, trainer.vocab_size - 1, seed=m) for m in range(4)]
    return lambda: train_step(trainer, batches) and None


def time_figures(sizes: str, batch: int, rounds: int) -> list[Figure]:
    """A step of 8 layers and 3 exits, predicted from those of 2 and 4 layers with and without 2 exits."""
    shapes = {
        "2": (2, ""),
        "4": (4, ""),
        "exits": (4, "--exit-layer-nums 1 2"),
        "large": (8, "--exit-layer-nums 2 4 6"),
    }
    words = {name: flags(layers, exits, batch, sizes) for name, (layers, exits) in shapes.items()}
    seconds = alternate({name: step_of(one) for name, one in words.items()}, rounds)
    two, four, exits, large = (statistics.median(seconds[name]) for name in shapes)
    small = predicted(words["2"], 1)
    tokens = small.microbatches * batch * small.config.model.seq_length
    layer, head = (four - two) / 2 / tokens, (exits - four) / 2 / tokens
    rest = two - tokens * (2 * layer + head)  # the update, bound by memory
    device = replace(
        DEVICE,
        actions={"layer_forward": layer / 3, "layer_backward": layer * 2 / 3, "head": head},
        memory_bandwidth=small.update * DEVICE.memory_bandwidth / max(rest, 1e-6),
    )
    step = predicted(words["large"], 1, device).step
    relative = [spent / step for spent in seconds["large"]]
    return [
        Figure.of("one process: step / predicted", relative, "x"),
        Figure("one process: time off by", abs(large / step - 1), "", 0.15, at_least=False),
    ]


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    sizes = "--hidden-size 256 --ffn-hidden-size 704 --seq-length 256"
    figures = memory_figures(sizes, 4 if options.quick else 8)
    return finish("planner", figures + time_figures(sizes, 2, 3 if options.quick else 9), options)


if __name__ == "__main__":
    raise SystemExit(main())
