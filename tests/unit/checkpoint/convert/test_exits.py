"""Exits added to models and moved in them: where their weights come from, and what the model then computes."""

from dataclasses import replace

import pytest
import torch

from megatron.checkpoint.convert.exits import NewExits, add_exits, declare_exits, move_exits
from megatron.errors import ConfigError
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.testing.tiny import build_gpt, evaluate_heads, random_batch
from tests.unit.checkpoint.convert.conftest import PADDED, VOCAB, Memory, assert_equal, of_model, toy


def tensors(source) -> dict[str, torch.Tensor]:
    found = {name: source.read(name) for name in source.specs()}
    assert {name: (spec.shape, spec.dtype) for name, spec in source.specs().items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()
    }
    return found


def model_of(source) -> GPT:
    """A running model with a source's tensors: they must be just those that its config asks for."""
    gpt, found = build_gpt(source.config.model, source.config.exits, VOCAB, PADDED, seed=99), tensors(source)
    parts = model_state(gpt, VOCAB)
    assert parts.keys() == found.keys()
    for name, part in parts.items():
        part.view.copy_(found[name])
    return gpt


def losses(source) -> dict[str, float]:
    scores = evaluate_heads(model_of(source), random_batch(vocab_size=VOCAB), VOCAB)
    return {label: score.loss.item() for label, score in scores.items()}


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("parts", [{}, {"norm": "own"}, {"mlp": True}, {"block": True},
                                   {"norm": "own", "mlp": True, "block": True}], ids=str)  # fmt: skip
def test_what_new_exits_are_copied_from(family, parts):
    source = toy(family=family)
    added = add_exits(source, NewExits((4, 2), **parts))
    found, old = tensors(added), source.tensors
    assert added.config.exits.exit_layer_nums == (2, 4)
    model_of(added)  # all that the config asks for is there, and no more
    assert_equal({name: found[name] for name in old}, old)
    head = "output.weight" if family == "llama" else "embedding.word.weight"
    for number in (2, 4):
        origins = {"output.weight": head, "output.weight.padding": f"{head}.padding"}
        for name in old:
            if parts.get("norm") and name.startswith("final_norm."):
                origins[name.replace("final_norm", "norm")] = name
            if parts.get("mlp") and name.startswith(f"layers.{number - 1}.mlp."):
                origins[name.replace(f"layers.{number - 1}.mlp", "branch")] = name
            if parts.get("block") and name.startswith("layers.3."):
                origins[name.replace("layers.3", "block")] = name
        exits = {name.removeprefix(f"exits.{number}."): tensor for name, tensor in found.items()
                 if name.startswith(f"exits.{number}.")}  # fmt: skip
        assert_equal(exits, {name: old[origin] for name, origin in origins.items()})


@pytest.mark.parametrize("parts", [{}, {"mlp": True}])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_an_exit_behind_the_last_layer_is_the_end_of_the_model(family, parts):
    """Its norm, its branch and its head are copies of what the model ends with."""
    found = losses(add_exits(toy(family=family), NewExits((4,), norm="own", **parts)))
    assert found["4"] == found["final"]


def test_old_exits_stay_as_they_are():
    source = toy("norm", "llama")  # at 4 and 1, in this order
    source.config = replace(
        source.config, exits=replace(source.config.exits, exit_layer_weight=(0.4, 0.1), exit_layer_temperature=(2, 3))
    )
    before = losses(source)
    added = add_exits(source, NewExits((1, 2), norm="own"))
    exits = added.config.exits
    assert (exits.exit_layer_nums, exits.exit_layer_weight) == ((1, 2, 4), (0.1, 1.0, 0.4))
    assert (exits.exit_layer_weight_init, exits.exit_layer_temperature) == ((), (3, 1.0, 2))
    after = losses(added)
    assert {label: after[label] for label in before} == before
    assert after.keys() - before.keys() == {"2"}


def test_old_tied_exits_get_the_matrix_they_used():
    source = toy("tied")
    before, added = losses(source), add_exits(source, NewExits((2,)))
    assert added.config.exits.untie_exit_output_weights
    assert {label: loss for label, loss in losses(added).items() if label != "2"} == before


def test_tied_exits_stay_tied_where_asked():
    source = toy("tied")
    added = add_exits(source, NewExits((2,), tied=True))
    assert not added.config.exits.untie_exit_output_weights
    assert added.specs() == source.specs()
    assert not [name for name in add_exits(toy(), NewExits((2,), tied=True)).specs() if name.startswith("exits.")]


def test_drawn_weights_are_those_of_the_seed():
    def draw(**changes):
        parts = {"norm": "own", "mlp": True, "block": True, "random": True, "std": 0.5}
        found = tensors(add_exits(toy(dtype=torch.bfloat16), NewExits((1, 4), **(parts | changes))))
        return {name: tensor for name, tensor in found.items() if name.startswith("exits.")}

    first = draw()
    assert_equal(draw(), first)
    other = draw(seed=5)
    for name, tensor in first.items():
        if tensor.dim() == 1:
            assert (tensor == (0 if name.endswith(".bias") else 1)).all()
        else:
            assert not torch.equal(tensor, other[name])
            # what writes into the residual stream is smaller, by the model's depth and not the exit's
            expected = 0.5 / 8**0.5 if name.endswith((".proj.weight", ".down.weight")) else 0.5
            assert tensor.float().std().item() == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("kind", ["tied", "untied", "block"])
def test_moved_exits_compute_the_same(kind):
    source = toy(kind)
    last = 4 in source.config.exits.exit_layer_nums
    if last:  # behind the last layer there is no input
        exits = tuple(number for number in source.config.exits.exit_layer_nums if number != 4)
        tensors_left = {name: t for name, t in source.tensors.items() if not name.startswith("exits.4.")}
        source = Memory(replace(source.config, exits=replace(source.config.exits, exit_layer_nums=exits)), tensors_left)
    moved = move_exits(source, "pre")
    assert moved.config.exits.pre_exit
    before, after = losses(source), losses(moved)
    assert {str(int(label) + 1) if label != "final" else label: loss for label, loss in before.items()} == after
    back = move_exits(of_model(moved.config, model_of(moved)), "post")
    assert (back.config, losses(back)) == (source.config, before)


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_declared_exits_are_the_models_own_end(family):
    source = toy(family=family)
    declared = declare_exits(source, (4, 2))
    assert declared.config.exits.exit_norm == "final"
    found = losses(declared)
    assert found["4"] == found["final"] != found["2"]
    new = declared.specs().keys() - source.specs().keys()
    assert bool(new) == (family == "llama")  # tied to the word embedding there is nothing to add


REFUSED = {
    "there already": ("tied", lambda s: add_exits(s, NewExits((3, 1))), "exits 1 3 are there already"),
    "beyond the end": ("none", lambda s: add_exits(s, NewExits((5,))), "5 lies beyond the model's depth"),
    "before the start": ("none", lambda s: add_exits(s, NewExits((0,))), "0: layers are counted from 1"),
    "other parts": (
        "mlp", lambda s: add_exits(s, NewExits((1,), norm="own")),
        r"exits 2 4 have a norm \(--use-exit-norm\) and an MLP .*, the new ones would have a norm",
    ),
    "other place": (
        "pre", lambda s: add_exits(s, NewExits((4,), norm="own", block=True, position="post")),
        "exits 2 3 are in position pre, the new ones would be in post",
    ),
    "mlp before": (
        "none", lambda s: add_exits(s, NewExits((2,), mlp=True, position="pre")), "--use-exit-mlp and --pre-exit",
    ),
    "tied beside untied": (
        "untied", lambda s: add_exits(s, NewExits((1,), tied=True)), "2 4 have output matrices of their own",
    ),
    "no exits to move": ("none", lambda s: move_exits(s, "pre"), "there are no exits to move"),
    "there they are": ("tied", lambda s: move_exits(s, "post"), "in position post already"),
    "behind the end": ("untied", lambda s: move_exits(s, "pre"), "exit 4 can't move .* after the last layer"),
    "mlp holds": ("mlp", lambda s: move_exits(s, "pre"), "an MLP of their own can't move"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name):
    kind, act, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        act(toy(kind))


def test_moving_before_the_first_layer_is_refused():
    source = toy("pre")
    source.config = replace(source.config, exits=replace(source.config.exits, exit_layer_nums=(1, 3)))
    with pytest.raises(ConfigError, match=r"exit 1 can't move .* before the first layer"):
        move_exits(source, "post")


def test_a_tied_exit_of_an_untied_model_is_refused():
    with pytest.raises(ConfigError, match="own head isn't tied"):
        add_exits(toy(family="llama"), NewExits((2,), tied=True))


def test_a_pre_exit_is_added_before_its_layer():
    source = toy()
    added = add_exits(source, NewExits((3,), position="pre"))
    assert losses(added)["3"] == losses(add_exits(source, NewExits((2,))))["2"]
    beside = add_exits(of_model(added.config, model_of(added)), NewExits((4,)))
    assert (beside.config.exits.pre_exit, beside.config.exits.exit_layer_nums) == (True, (3, 4))
