"""torch's FSDP2 as an oracle of the sharded optimizer: after some steps, parameters and moments are the same.

There, one plain autograd graph over the whole model and all exits, sharded by `fully_shard`, torch's AdamW and torch's
clipping; here, `--use-distributed-optimizer`, in layouts with other axes too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from megatron.config.run import RunConfig
from megatron.exits.spec import FINAL, exit_specs
from megatron.model.gpt import GPT
from megatron.model.names import named_parts
from megatron.model.partition import partition
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.testing.layouts import VOCAB, Whole, assemble, build, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.step import train_step

STEPS, SAMPLES, LENGTH = 3, 8, 16
MOMENTS = ("exp_avg", "exp_avg_sq")


class WithObjective(nn.Module):
    """A whole model whose forward pass gives the weighted sum of all heads' losses."""

    def __init__(self, config: RunConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        specs = exit_specs(config.exits)
        self.weights = {spec.label: spec.weight for spec in specs} | {FINAL: 1.0}
        self.model = GPT(config.model, config.exits, partition((config.model.num_layers,), specs), 64).double()
        self.model.load_state_dict(state)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: [b, s]."""
        model = self.model
        hidden = model.embedding(tokens, None, None)
        context = model.context(LENGTH, hidden)
        _, taps = model(hidden, context, model.stages[0])
        total = torch.zeros((), dtype=torch.float64)
        for label, weight in self.weights.items():
            logits = model.features(label, taps[label], context) @ model.output_weight(label).t()
            total = total + weight * F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.flatten())
        return total


def batches_of(step: int, rank: int, dp: int) -> list:
    """The microbatches of a data-parallel rank; all ranks together have the same eight in every layout."""
    seeds = range(100 * step + rank, 100 * step + SAMPLES, dp)
    return [random_batch(1, LENGTH, VOCAB, seed, eod_mask_loss=False) for seed in seeds]


def fsdp_steps(mesh: Mesh, config: RunConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters after the steps, and moments as kind/name, put together from the shards."""
    dp, flags = mesh.size("dp"), config.optimizer
    model = WithObjective(config, state)
    ranks = DeviceMesh.from_group(mesh.group("dp"), "cpu")
    for layer in model.model.layers.values():
        fully_shard(layer, mesh=ranks)
    fully_shard(model, mesh=ranks)
    named = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    assert all(p.to_local().numel() < p.numel() for p in named.values() if p.dim() > 1)
    decayed = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": flags.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (flags.adam_beta1, flags.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate.lr, betas=betas, eps=flags.adam_eps, foreach=False)
    for step in range(STEPS):
        batches = batches_of(step, mesh.rank("dp"), dp)
        for number, batch in enumerate(batches, start=1):
            model.set_requires_gradient_sync(number == len(batches))
            (model(batch.tokens, batch.labels) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), flags.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p.full_tensor().detach() for name, p in named.items()}
    for kind in MOMENTS:
        found |= {f"{kind}/{name}": optimizer.state[p][kind].full_tensor() for name, p in named.items()}
    return found


def our_steps(mesh: Mesh, config: RunConfig) -> dict:
    """The whole state after the steps, as this rank's parts."""
    torch.set_default_dtype(torch.float64)
    trainer = build(mesh, config, torch.float64)
    for step in range(STEPS):
        report = train_step(trainer, batches_of(step, mesh.rank("dp"), mesh.size("dp")))
        assert report.applied and report.grad_norm > config.optimizer.clip_grad  # clipping has something to do
    torch.set_default_dtype(torch.float32)
    state = checkpoints.state_tensors(trainer)
    return {"after": {name: (part.view.clone(), part.shape, part.offset) for name, part in state.items()}}


MODELS = {
    "untied": "--exit-layer-nums 1 3 --exit-layer-weight 0.3 0.5 --untie-exit-output-weights "
    "--untie-embeddings-and-output-weights --use-exit-norm --normalization RMSNorm --position-embedding-type rope",
    "tied": "--exit-layer-nums 2 4 --exit-layer-weight 0.3 0.5 --exit-norm final",
}
FLAGS = "--init-method-std 0.3 --weight-decay 0.1 --clip-grad 0.5 --lr 1e-2 --lr-decay-style constant"


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("untied", {"dp": 2}),
        ("tied", {"dp": 2, "pp": 2}),
        pytest.param("tied", {"dp": 4}, marks=pytest.mark.slow),
        pytest.param("untied", {"dp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param("untied", {"dp": 2, "tp": 2, "pp": 2}, marks=pytest.mark.slow),
        pytest.param("tied", {"dp": 4, "pp": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_optimizer_is_fully_sharded_data_parallelism(ranks: Ranks, model: str, layout: dict) -> None:
    config = toy_config(*FLAGS.split(), *MODELS[model].split(), "--use-distributed-optimizer")
    torch.set_default_dtype(torch.float64)  # initial values are drawn in it
    trainer = build(ONE_RANK, config, torch.float64)
    torch.set_default_dtype(torch.float32)
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    theirs = ranks.run(fsdp_steps, config, state, dp=layout["dp"])[0]
    found = assemble(ranks.run(our_steps, config, **layout), "after")

    expected: Whole = {}
    for key, tensor in theirs.items():
        kind, _, name = key.rpartition("/")
        for part, placed in named_parts(name, tensor, trainer.model, trainer.vocab_size):
            prefix = f"{checkpoints.OPTIMIZER}{kind}/" if kind else checkpoints.MODEL
            expected[prefix + part] = placed.view
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    moved = max(float((tensor - state[name]).abs().max()) for name, tensor in theirs.items() if name in state)
    assert moved > 1e-2
