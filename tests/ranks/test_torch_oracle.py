"""torch's own pipeline schedules as a second oracle: the same model with exits in their hands, the same gradients.

torch knows no exit losses, and where it splits backward passes no side branches either. A stage's module therefore runs
its exits' backward to detached taps at once, and `_WithGradients` adds what comes of it on the way back. Each rank has
the whole model and runs its stages alone, so the whole gradient is the sum over ranks, tied matrices included.
"""

import pytest
import torch
import torch.distributed.pipelining as pipelining
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.run import RunConfig
from megatron.exits.spec import FINAL, exit_specs
from megatron.model.gpt import GPT
from megatron.model.names import named_parts
from megatron.model.partition import StageSpec, partition
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.testing.layouts import VOCAB, Whole, assemble, build, one_step, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import random_batch

MICROBATCHES, LENGTH = 8, 16


class _WithGradients(torch.autograd.Function):
    """The hidden state as it is; backward, taps get gradients that are known already."""

    @staticmethod
    def forward(ctx, hidden: Tensor, count: int, *taps_and_gradients: Tensor) -> Tensor:
        ctx.gradients = taps_and_gradients[count:]
        return hidden.clone()  # no view: torch detaches what a stage hands on in place

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *ctx.gradients, *(None for _ in ctx.gradients)


class StageModule(nn.Module):
    """A stage as torch's schedules take it: tokens or hidden state in, hidden state or logits out.

    Its parameters are those that the stage uses.
    """

    def __init__(self, model: GPT, spec: StageSpec) -> None:
        super().__init__()
        self.whole = (model,)  # not registered: other stages' parameters are none of ours
        self.spec = spec
        heads = [model.exits[exit.label] for exit in spec.exits]
        layers = [model.layers[str(i)] for i in range(spec.first, spec.last)]
        self.parts = nn.ModuleList([*layers, *heads, model.embedding, model.final_norm])
        if model.output is not None:
            self.parts.append(model.output)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x: tokens [b, s] or hidden state [s, b, h]; labels [b, s]."""
        (model,) = self.whole
        hidden = model.embedding(x, None, None) if self.spec.is_first else x
        context = model.context(LENGTH, hidden)
        hidden, taps = model(hidden, context, self.spec)
        for exit in self.spec.exits:
            leaves = tuple(tap.detach().requires_grad_() for tap in taps[exit.label])
            logits = model.features(exit.label, leaves, context) @ model.output_weight(exit.label).t()
            (exit.weight * mean_loss(logits.transpose(0, 1), labels)).backward()
            hidden = _WithGradients.apply(hidden, len(leaves), *taps[exit.label], *(leaf.grad for leaf in leaves))
        if not self.spec.is_last:
            return hidden
        logits = model.features(FINAL, (hidden,), context) @ model.output_weight(FINAL).t()
        return logits.transpose(0, 1).clone()


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of a microbatch, as it counts in the step."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / MICROBATCHES


def torch_step(mesh: Mesh, config: RunConfig, state: dict[str, Tensor], kind: str) -> dict[str, Tensor | None]:
    """What this rank adds to the gradients of the whole model, by parameter name, and the mean final loss."""
    torch.set_default_dtype(torch.float64)
    p, rank = mesh.size("pp"), mesh.rank("pp")
    chunks = 1 if kind in ("GPipe", "1F1B") else 2
    stages = partition((config.model.num_layers // (p * chunks),) * (p * chunks), exit_specs(config.exits))
    model = GPT(config.model, config.exits, stages, 64).double()
    model.load_state_dict(state)
    mine = [rank] if chunks == 1 else [rank, 2 * p - 1 - rank if kind == "ZBVZeroBubble" else rank + p]
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    hidden = torch.zeros(LENGTH, 1, config.model.hidden_size, requires_grad=True)  # else torch sends no gradient back
    logits = torch.zeros(1, LENGTH, 64, requires_grad=True)
    made = [
        pipelining.PipelineStage(
            StageModule(model, stages[i]),
            i,
            len(stages),
            mesh.backend.device,
            input_args=hidden if i else tokens,
            output_args=hidden if i + 1 < len(stages) else logits,
            group=mesh.group("pp"),
        )
        for i in mine
    ]
    schedule = getattr(pipelining, f"Schedule{kind}")(
        made[0] if chunks == 1 else made, MICROBATCHES, loss_fn=mean_loss, scale_grads=False
    )
    batches = [random_batch(1, LENGTH, VOCAB, seed=m, eod_mask_loss=False) for m in range(MICROBATCHES)]
    tokens, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
    losses: list[Tensor] = []
    schedule.step(
        *([tokens] if 0 in mine else []),
        labels=labels,
        **({"target": labels, "losses": losses} if len(stages) - 1 in mine else {}),
    )
    torch.set_default_dtype(torch.float32)
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": sum(losses).detach() if losses else None}


KINDS = {
    "GPipe": "--pipeline-schedule gpipe",
    "1F1B": "",
    "Interleaved1F1B": "--num-layers-per-virtual-pipeline-stage 1",
    "InterleavedZeroBubble": "--pipeline-schedule zb-h1",
    "ZBVZeroBubble": "--pipeline-schedule zb-h1",
}
UNTIED = "--untie-exit-output-weights --untie-embeddings-and-output-weights"
LLAMA = "--normalization RMSNorm --position-embedding-type rope"
MODELS = {
    "tied": "--exit-layer-nums 1 3 4 --exit-layer-weight 0.3 0.5 0.7",
    "final_norm": "--exit-layer-nums 1 2 --exit-layer-weight 0.3 0.5 --exit-norm final",
    "untied": f"--exit-layer-nums 2 3 --exit-layer-weight 0.3 0.5 --use-exit-norm {UNTIED}",
    "mlp": "--exit-layer-nums 1 2 3 4 --exit-layer-weight 0.3 0.5 0.7 0.9 --use-exit-mlp",
    "block": f"--exit-layer-nums 2 4 --exit-layer-weight 0.3 0.5 --use-exit-block {LLAMA}",
}


def pairs() -> list:
    """All; one of each schedule's, such that every model occurs, is in the quick tier."""
    quick = dict(zip(KINDS, MODELS, strict=True))
    return [
        pytest.param(kind, model, marks=() if quick[kind] == model else pytest.mark.slow)
        for kind in KINDS
        for model in MODELS
    ]


@pytest.mark.parametrize(("kind", "model"), pairs())
def test_gradients_are_those_of_torchs_schedules(ranks: Ranks, kind: str, model: str) -> None:
    """Two ranks; four layers, one or two a stage."""
    config = toy_config(*MODELS[model].split(), *KINDS[kind].split())
    torch.set_default_dtype(torch.float64)  # initial values are drawn in it
    trainer = build(ONE_RANK, config, torch.float64)
    torch.set_default_dtype(torch.float32)
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    theirs = ranks.run(torch_step, config, state, kind, pp=2)
    ours = ranks.run(one_step, config, torch.float64, pp=2)

    expected: Whole = {}
    for name, parameter in trainer.model.named_parameters():
        total = sum((one[name] for one in theirs if one[name] is not None), torch.zeros_like(parameter))
        for part, placed in named_parts(name, total, trainer.model, trainer.vocab_size):
            expected[part] = placed.view
    found = assemble(ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    (loss,) = [float(one["loss"]) for one in theirs if one["loss"] is not None]
    assert ours[0]["losses"][FINAL] == pytest.approx(loss, rel=1e-10)
