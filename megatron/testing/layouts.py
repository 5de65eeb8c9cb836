"""One optimizer step of a toy model in any layout, and the same in one process: for tests that compare them."""

from dataclasses import replace
from typing import Any

import torch

from megatron.config.load import load
from megatron.config.run import RunConfig
from megatron.data.loader import Microbatch
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.selfcheck import gradient_parts, initialise_all
from megatron.train.step import train_step
from megatron.train.trainer import Trainer

VOCAB = 60

Whole = dict[str, torch.Tensor]


def toy_config(*flags: str) -> RunConfig:
    """A toy run of four layers; `flags` come last and win."""
    words = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --init-method-std 0.1 "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCAB} --padded-vocab-size 64 --data-path none "
        "--attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1 --global-batch-size 8 "
        "--train-iters 10 --lr 1e-2 --clip-grad 1.0"
    )
    return load([*words.split(), *flags]).config


def build(mesh: Mesh, config: RunConfig, dtype: torch.dtype) -> Trainer:
    """A trainer whose initial values are those of every other layout; norms and biases are perturbed, too."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=mesh.size("tp"),
        pipeline_model_parallel_size=mesh.size("pp"),
    )
    trainer = build_trainer(replace(config, parallel=parallel), dtype=dtype, mesh=mesh)
    initialise_all(trainer, config.training.seed)
    return trainer


def one_step(
    mesh: Mesh, config: RunConfig, dtype: torch.dtype, bucket: int | None = None, sequences: int = 8
) -> dict[str, Any]:
    """Losses, gradient norm and this rank's gradients (before clipping), as parts of the whole model's.

    The batch is the same in every layout; each data-parallel rank takes its share. bucket: most elements of a gradient
    bucket, where it is to be fewer than usual.
    """
    torch.set_default_dtype(dtype)
    trainer = build(mesh, config, dtype)
    if bucket is not None:
        trainer.optimizer.sync.make_buckets(bucket)
    dp = mesh.size("dp")
    seeds = range(mesh.rank("dp"), sequences, dp)
    batches = [random_batch(1, 16, VOCAB, seed=seed, eod_mask_loss=False) for seed in seeds]
    gradients: dict[str, Any] = {}
    inner = trainer.optimizer.sync.total_norm

    def note() -> float:
        gradients.update(gradient_parts(trainer))
        return inner()

    trainer.optimizer.sync.total_norm = note
    report = train_step(trainer, batches)
    assert report.applied, report.problem
    torch.set_default_dtype(torch.float32)
    state = checkpoints.state_tensors(trainer)
    after = {name: (part.view.clone(), part.shape, part.offset) for name, part in state.items()}
    return {"losses": report.losses, "grad_norm": report.grad_norm, "gradients": gradients, "after": after}


def assemble(answers: list[dict[str, Any]], what: str = "gradients") -> Whole:
    """The whole model's tensors out of all ranks'; copies must agree with each other."""
    whole: Whole = {}
    filled: dict[str, torch.Tensor] = {}
    for answer in answers:
        for name, (view, shape, offset) in answer[what].items():
            target = whole.setdefault(name, torch.zeros(shape, dtype=view.dtype))
            seen = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            for dim, (start, length) in enumerate(zip(offset, view.shape, strict=True)):
                target, seen = target.narrow(dim, start, length), seen.narrow(dim, start, length)
            if bool(seen.any()):
                torch.testing.assert_close(target, view, rtol=1e-6, atol=1e-12, msg=f"copies of {name} differ")
            target.copy_(view)
            seen.fill_(True)
    for name, seen in filled.items():
        assert bool(seen.all()), f"no rank has all of {name}"
    return whole


def losses_of_steps(mesh: Mesh, config: RunConfig, steps: int, alike: bool = False) -> list[dict[str, float]]:
    """The losses of some steps from scratch in fp32. alike: all data-parallel ranks see the data of one alone."""
    trainer = build(mesh, config, torch.float32)
    found = []
    for _ in range(steps):
        batches = _toy_batches(ONE_RANK if alike else mesh, trainer.progress.iteration)
        found.append(train_step(trainer, batches).losses)
    return found


def save_after_steps(mesh: Mesh, config: RunConfig, steps: int) -> None:
    """Train a few steps from scratch and save under --save."""
    trainer = build(mesh, config, torch.float32)
    for _ in range(steps):
        train_step(trainer, _toy_batches(mesh, trainer.progress.iteration))
    checkpoints.save(trainer)


def resume_and_step(mesh: Mesh, config: RunConfig) -> dict[str, Any]:
    """Load from --load; the whole state as this rank's parts, and the losses of the next step."""
    trainer = build(mesh, config, torch.float32)
    checkpoints.start(trainer)
    parts = checkpoints.state_tensors(trainer)
    state = {name: (part.view.clone(), part.shape, part.offset) for name, part in parts.items()}
    report = train_step(trainer, _toy_batches(mesh, trainer.progress.iteration))
    return {"gradients": state, "losses": report.losses, "iteration": trainer.progress.iteration}


def _toy_batches(mesh: Mesh, step: int) -> list[Microbatch]:
    dp = mesh.size("dp")
    return [random_batch(1, 16, VOCAB, seed=100 * step + m * dp + mesh.rank("dp")) for m in range(8 // dp)]
