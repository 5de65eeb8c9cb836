"""The staged backward (F, E, B) against plain autograd over the weighted sum of all losses."""

import pytest
import torch
import torch.nn.functional as F

from megatron.config.model import ExitConfig
from megatron.config.training import TrainingConfig
from megatron.exits.loss import Objective
from megatron.exits.spec import FINAL, exit_specs
from megatron.model.gpt import GPT
from megatron.model.partition import partition
from megatron.model.stage import Stage
from megatron.parallel.rng import DropoutStream
from megatron.testing.tiny import accumulate, build_gpt, evaluate_heads, model_config, random_batch

EXITS = {
    "none": ExitConfig(),
    "tied": ExitConfig(exit_layer_nums=(1, 3)),
    "pre": ExitConfig(exit_layer_nums=(1, 3), pre_exit=True, untie_exit_output_weights=True),
    "norm": ExitConfig(exit_layer_nums=(2, 4), exit_norm="own", untie_exit_output_weights=True),
    "final_norm": ExitConfig(exit_layer_nums=(2,), exit_norm="final"),
    "mlp": ExitConfig(exit_layer_nums=(3, 1), use_exit_mlp=True, exit_norm="own"),
    "block": ExitConfig(exit_layer_nums=(2, 3), use_exit_block=True, use_exit_mlp=True, exit_norm="own"),
    "temperature": ExitConfig(exit_layer_nums=(1, 2), exit_layer_temperature=(2.0, 0.5)),
}
WEIGHTS = (0.3, 0.7)


def objective(exits: ExitConfig, **changes) -> Objective:
    specs = exit_specs(exits)
    weights = {spec.label: WEIGHTS[i] for i, spec in enumerate(specs)}
    return Objective(
        weights=weights | {FINAL: 1.0},
        temperatures={spec.label: spec.temperature for spec in specs},
        dynamic=frozenset(),
        **changes,
    )


def staged_gradients(model: GPT, batches, goal: Objective, kind="1f1b", streams=None):
    model.train()
    for p in model.parameters():
        p.main_grad.zero_()
    terms = accumulate(Stage(model), batches, goal, streams, kind)
    return terms, {name: p.main_grad.clone() for name, p in model.named_parameters()}


def plain_gradients(model: GPT, batches, goal: Objective):
    """One graph over everything, logits and all."""
    total, losses = 0, {}
    for batch in batches:
        hidden = model.embedding(batch.tokens, batch.position_ids, None)
        context = model.context(batch.tokens.shape[1], hidden, batch.document_ids)
        _, taps = model(hidden, context, model.stages[0])
        for label in model.head_labels():
            logits = model.features(label, taps[label], context) @ model.output_weight(label).t()
            logits = logits / goal.temperatures.get(label, 1.0)
            token_losses = F.cross_entropy(logits.permute(1, 2, 0), batch.labels, reduction="none")
            loss = (token_losses * batch.loss_mask).sum() / batch.loss_mask.sum() / len(batches)
            losses[label] = losses.get(label, 0) + loss.detach()
            total = total + goal.weights[label] * goal.scale * loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return losses, dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("kind", EXITS)
def test_gradients_equal_autograd(family, kind):
    exits = EXITS[kind]
    model = build_gpt(model_config(family), exits, dtype=torch.float64)
    batches = [random_batch(seed=i, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
               for i in range(3)]  # fmt: skip
    goal = objective(exits, scale=4.0)
    terms, ours = staged_gradients(model, batches, goal)
    losses, theirs = plain_gradients(model, batches, goal)
    for label, loss in losses.items():
        torch.testing.assert_close(sum(term.loss[label] for term in terms) / 3, loss, rtol=1e-12, atol=0)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_accumulation_of_8_microbatches_equals_one_of_8():
    exits = EXITS["tied"]
    model = build_gpt(model_config(), exits, dtype=torch.float64)
    whole = random_batch(batch=8)
    parts = [type(whole)(whole.tokens[i:i + 1], whole.labels[i:i + 1], whole.loss_mask[i:i + 1], None, None)
             for i in range(8)]  # fmt: skip
    one_terms, one = staged_gradients(model, [whole], objective(exits))
    eight_terms, eight = staged_gradients(model, parts, objective(exits))
    for name in one:
        torch.testing.assert_close(one[name], eight[name], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(one_terms[0].loss[FINAL], sum(term.loss[FINAL] for term in eight_terms) / 8)


def test_schedules_agree():
    exits = EXITS["mlp"]
    model = build_gpt(model_config(), exits)
    batches = [random_batch(seed=i) for i in range(4)]
    _, a = staged_gradients(model, batches, objective(exits), "1f1b")
    _, b = staged_gradients(model, batches, objective(exits), "gpipe")
    assert all(torch.equal(a[name], b[name]) for name in a)


RECOMPUTE = [
    TrainingConfig(recompute_granularity="selective"),
    TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=3),
    TrainingConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
]


@pytest.mark.parametrize("training", RECOMPUTE, ids=["selective", "uniform1", "uniform3", "block2"])
@pytest.mark.parametrize("kind", ["mlp", "pre", "block"])
def test_recompute_changes_no_bit_with_dropout(training, kind):
    model = model_config(dropout=0.2)
    exits = EXITS[kind]
    plain = build_gpt(model, exits)
    stages = partition((model.num_layers,), exit_specs(exits))
    saving = GPT(model, exits, stages, 64, training)
    saving.load_state_dict(plain.state_dict())
    for p in saving.parameters():
        p.main_grad = p.grad = torch.zeros_like(p)
    batches = [random_batch(seed=i) for i in range(2)]
    results = [
        staged_gradients(m, batches, objective(exits), streams=[DropoutStream(1, 0, i) for i in range(2)])
        for m in (plain, saving)
    ]
    (terms_a, grads_a), (terms_b, grads_b) = results
    assert all(
        torch.equal(a.loss[label], b.loss[label]) for a, b in zip(terms_a, terms_b, strict=True) for label in a.loss
    )
    assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


def test_dropout_draws_by_place_not_by_order():
    model = build_gpt(model_config(dropout=0.5), EXITS["block"])
    model.train()
    batch, stage = random_batch(), Stage(model)
    first = stage.forward(batch, DropoutStream(7, 3, 1)).hidden
    torch.rand(100)
    again = stage.forward(batch, DropoutStream(7, 3, 1)).hidden
    other = stage.forward(batch, DropoutStream(7, 3, 2)).hidden
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_per_token_loss_weighs_tokens_alike():
    """One microbatch with 3 unmasked tokens, one with 13: per token, not per microbatch."""
    model = build_gpt(model_config(), dtype=torch.float64)
    masks = [torch.zeros(1, 16), torch.zeros(1, 16)]
    masks[0][0, :3], masks[1][0, :13] = 1, 1
    batches = [random_batch(batch=1, seed=i) for i in range(2)]
    batches = [type(b)(b.tokens, b.labels, mask, None, None) for b, mask in zip(batches, masks, strict=True)]
    terms, _ = staged_gradients(
        model, batches, objective(ExitConfig(), mean_tokens=torch.tensor(8.0, dtype=torch.float64))
    )
    scores = [evaluate_heads(model, batch)[FINAL].loss for batch in batches]
    torch.testing.assert_close(sum(term.loss[FINAL] for term in terms) / 2, sum(scores) / 16)


def test_fully_masked_microbatch_counts_zero():
    model = build_gpt(model_config())
    batch = random_batch()
    empty = type(batch)(batch.tokens, batch.labels, torch.zeros_like(batch.loss_mask), None, None)
    terms, grads = staged_gradients(model, [empty], objective(ExitConfig()))
    assert float(terms[0].loss[FINAL]) == 0
    assert all(not grad.any() for grad in grads.values())


def test_evaluation_scores_every_head():
    exits = EXITS["tied"]
    model = build_gpt(model_config(), exits).eval()
    batch = random_batch(eod_mask_loss=True)
    scores = evaluate_heads(model, batch, 40)
    assert list(scores) == ["1", "3", FINAL]
    assert float(scores[FINAL].agree) == float(batch.loss_mask.sum())
    for label, score in scores.items():
        hidden = model.embedding(batch.tokens, None, None)
        context = model.context(16, hidden)
        _, taps = model(hidden, context, model.stages[0])
        logits = model.features(label, taps[label], context) @ model.output_weight(label).t()
        hits = (logits[..., :40].argmax(-1).t() == batch.labels) * batch.loss_mask
        assert float(score.correct) == float(hits.sum())
