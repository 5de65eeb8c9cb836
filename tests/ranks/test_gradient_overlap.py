"""Gradients are summed bucket by bucket while the last backward pass goes on, and are those of one process."""

import sys
from pathlib import Path

import pytest
import torch

from megatron.config.run import RunConfig
from megatron.model.stage import Stage
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.testing.layouts import VOCAB, assemble, build, one_step, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import random_batch
from megatron.train.step import train_step

SMALL = 1500  # elements: the toy's layers then have several buckets, and its larger matrices several parts
UNTIED = "--untie-embeddings-and-output-weights --untie-exit-output-weights"
EXITS = "--exit-layer-nums 1 3 --exit-layer-weight 0.3 0.7 --use-exit-norm"
ZERO = "--use-distributed-optimizer"


@pytest.mark.parametrize(
    ("flags", "more", "layout"),
    [
        (EXITS, "", {"dp": 2}),
        (f"{EXITS} {UNTIED} --use-exit-block", ZERO, {"dp": 2, "tp": 2}),
        (f"{EXITS} {UNTIED}", f"{ZERO} --num-layers-per-virtual-pipeline-stage 1", {"dp": 2, "pp": 2}),
        pytest.param(EXITS, f"{ZERO} --pipeline-schedule zb-h1", {"dp": 2, "pp": 2}, marks=pytest.mark.slow),
        pytest.param(EXITS, f"{ZERO} --sequence-parallel", {"dp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param(f"{EXITS} --use-exit-mlp", ZERO, {"dp": 3}, marks=pytest.mark.slow),
        pytest.param(f"{EXITS} {UNTIED}", "", {"dp": 4}, marks=pytest.mark.slow),
    ],
)
def test_small_buckets_sum_to_the_same_gradients(ranks: Ranks, flags: str, more: str, layout: dict[str, int]) -> None:
    sequences = "--global-batch-size", "12"
    alone = one_step(ONE_RANK, toy_config(*flags.split(), *sequences), torch.float64, None, 12)
    config = toy_config(*flags.split(), *more.split(), *sequences)
    answers = ranks.run(one_step, config, torch.float64, SMALL, 12, **layout)
    for what in ("gradients", "after"):
        expected, found = assemble([alone], what), assemble(answers, what)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=f"{what} of {name}")


def begun_when(mesh: Mesh, config: RunConfig, dtype: torch.dtype) -> list[str]:
    """What was going on as each bucket was sent: the number of backward passes begun, or "after" them all."""
    trainer = build(mesh, config, dtype)
    sync, log, running = trainer.optimizer.sync, [], []
    sync.make_buckets(SMALL)
    begin, backward = sync._begin, Stage.backward

    def note(bucket: object) -> None:
        log.append(running[-1] if running and running[-1] else "after")
        begin(bucket)

    def count(stage: Stage, *args: object) -> object:
        running.append(f"backward {1 + len([one for one in running if one])}")
        try:
            return backward(stage, *args)
        finally:
            running.append("")

    sync._begin, Stage.backward = note, count
    try:
        batches = [random_batch(1, 16, VOCAB, seed=m) for m in range(3)]
        train_step(trainer, batches)
    finally:
        Stage.backward = backward
    return log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", ["", ZERO])
def test_buckets_leave_during_the_last_backward_pass(ranks: Ranks, dtype: torch.dtype, more: str) -> None:
    config = toy_config(*f"{EXITS} {UNTIED} --global-batch-size 6 {more}".split())
    logs = ranks.run(begun_when, config, dtype, dp=2)
    assert logs[0] == logs[1]
    during = [when for when in logs[0] if when != "after"]
    assert set(during) == {"backward 3"}
    assert len(during) >= 4 * 4  # each of the four layers' four matrices is larger than a bucket


def threads_beside_a_trainer(mesh: Mesh, config: RunConfig) -> int:
    """Threads of this process while a trainer and its process groups are there."""
    trainer = build(mesh, config, torch.float32)
    assert trainer.optimizer.sync.overlaps
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in Linux's /proc")
def test_a_trainer_that_is_gone_leaves_no_process_groups(ranks: Ranks) -> None:
    config = toy_config(*EXITS.split())
    first, *_, last = (max(ranks.run(threads_beside_a_trainer, config, dp=2)) for _ in range(6))
    assert last < first + 5  # each trainer has nine of its own
