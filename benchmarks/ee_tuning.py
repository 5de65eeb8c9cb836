"""Tuning exits on a frozen backbone: the time of a step against its FLOPs, and what gradients and optimizer take.

On the CPU in fp32, each contestant takes a step in turn. A tuning step is the backbone's forward pass as far as the
last exit, and forward and backward of the exits; the yardstick is a full training step of the same model without exits.
"""

from collections.abc import Callable

from report import Figure, alternate, arguments, finish, ratios
from train_step import Shape

from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.training import LrConfig, OptimizerConfig, TrainingConfig
from megatron.parallel.backend import Backend
from megatron.planning.flops import exit_flops, layer_flops, training_flops_per_token
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.step import train_step
from megatron.train.trainer import Trainer

EXITS = {"1 exit, a quarter of the model": ((2,), 4), "1 exit": ((2,), 1), "3 exits": ((2, 4, 6), 1)}


def trainer_of(shape: Shape, exits: tuple[int, ...], stages: int, tune: bool) -> Trainer:
    """A run of that shape; tuned, it has norms, MLPs and output matrices in its exits."""
    structure = {"exit_norm": "own", "use_exit_mlp": True, "untie_exit_output_weights": True} if exits else {}
    config = RunConfig(
        model=shape.config(),
        exits=ExitConfig(exit_layer_nums=exits, **structure),
        parallel=ParallelConfig(tune_exit=tune, pipeline_model_parallel_size=stages),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=shape.vocab - 1),
        training=TrainingConfig(micro_batch_size=shape.batch, global_batch_size=shape.batch, train_iters=1000),
        optimizer=OptimizerConfig(weight_decay=0.0),
        learning_rate=LrConfig(lr=1e-3),
    )
    trainer = build_trainer(config, Backend.choose("gloo"))
    checkpoints.start(trainer)
    return trainer


def step_of(trainer: Trainer, shape: Shape) -> Callable[[], None]:
    """A step on one microbatch."""
    batch = random_batch(shape.batch, shape.length, shape.vocab - 1)
    return lambda: train_step(trainer, [batch]) and None


def tuning_flops(shape: Shape, exits: tuple[int, ...]) -> float:
    """Per token: the backbone forward to the last exit, each exit forward and backward."""
    model, heads = shape.config(), ExitConfig(exit_layer_nums=exits, use_exit_mlp=True)
    backbone = max(exits) * layer_flops(model, shape.length)
    return backbone + 3 * len(exits) * exit_flops(model, heads, shape.length, shape.vocab)


def time_figures(shape: Shape, rounds: int) -> list[Figure]:
    """Each kind of tuning step over a full step, against the same ratio of FLOPs."""
    trainers = {name: trainer_of(shape, exits, stages, True) for name, (exits, stages) in EXITS.items()}
    steps = {name: step_of(trainer, shape) for name, trainer in trainers.items()}
    steps["full"] = step_of(trainer_of(shape, (), 1, False), shape)
    seconds = alternate(steps, rounds)
    full, figures = training_flops_per_token(shape.config(), ExitConfig(), shape.vocab), []
    for name, (exits, _) in EXITS.items():
        share = tuning_flops(shape, exits) / full
        relative = ratios(seconds[name], seconds["full"])
        figures.append(Figure.of(f"step that tunes {name} / full training step", relative, "x"))
        beside = [ratio / share for ratio in relative]
        figures.append(Figure.of(f"the same / FLOP prediction, {name}", beside, "x", 1.10, at_least=False))
    return figures


def memory_figures(shape: Shape) -> list[Figure]:
    """Bytes of gradients and optimizer state over those of the exits' parameters; parameters loaded."""
    figures, loaded = [], {}
    for name, (exits, stages) in EXITS.items():
        trainer = trainer_of(shape, exits, stages, True)
        optimizer, own = trainer.optimizer, sum(p.numel() for p in trainer.model.exits.parameters())
        held = sum(p.main_grad.numel() for p in optimizer.parameters.values())
        held += sum(tensor.numel() for _, _, tensor in optimizer.state_tensors())
        frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
        held += sum(p.grad.numel() for p in frozen if p.grad is not None)
        figures.append(
            Figure(f"gradients and moments / 3 x the exits' parameters, {name}", held / (3 * own), "x", 1.0, False)
        )
        loaded[name] = sum(p.numel() for p in trainer.model.parameters())
    ratio = loaded["1 exit, a quarter of the model"] / loaded["1 exit"]
    return [*figures, Figure("parameters loaded for 1 exit: a quarter of the layers / all", ratio, "x")]


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    shape = Shape(layers=8, hidden=64, ffn=192, vocab=1024, length=64) if options.quick else Shape()
    return finish("ee_tuning", time_figures(shape, 5 if options.quick else 21) + memory_figures(shape), options)


if __name__ == "__main__":
    raise SystemExit(main())
