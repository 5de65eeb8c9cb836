import pytest
import torch

from megatron.checkpoint.state import RunState, check, copy_into, copy_padding, entries
from megatron.errors import CheckpointError


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def test_copies_into_views_of_live_parameters():
    weight = torch.nn.Parameter(torch.zeros(5, 2))
    target = {"model/output.weight": weight[:3], "model/output.weight.padding": weight[3:]}
    source = {"model/output.weight": random(3, 2), "model/output.weight.padding": random(2, 2)}
    copy_into(source, target, "it")
    assert torch.equal(weight.detach(), torch.cat(list(source.values())))
    assert weight.requires_grad and weight.is_leaf


def test_nothing_is_copied_when_anything_differs():
    target = {"model/a": torch.zeros(2), "model/b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        copy_into({"model/a": torch.ones(2), "model/b": torch.ones(4)}, target, "it")
    assert not target["model/a"].any()


def test_one_message_lists_every_kind_of_difference():
    found = {"model/a": ((2,), torch.float32), "model/x": ((1,), torch.float32), "model/t": ((1,), torch.int64)}
    wanted = {"model/a": ((3,), torch.float32), "model/y": ((4, 2), torch.float32), "model/t": ((1,), torch.float32)}
    with pytest.raises(CheckpointError) as raised:
        check(found, wanted, "/some/dir")
    text = str(raised.value)
    assert "/some/dir does not fit" in text
    assert "model/y [4, 2]" in text
    assert "model/x [1]" in text
    assert "model/a: checkpoint [2], model [3]" in text
    assert "model/t: checkpoint int64, model float32" in text


def test_only_the_first_names_are_shown():
    wanted = {f"model/{n:02d}": ((1,), torch.float32) for n in range(30)}
    with pytest.raises(CheckpointError, match="and 22 more") as raised:
        check({}, wanted, "it")
    assert "model/07" in str(raised.value)
    assert "model/08" not in str(raised.value)


def one(*names):
    return {name: ((2,), torch.float32) for name in names}


@pytest.mark.parametrize(
    ("found", "wanted", "hint"),
    [
        (
            one("model/exits.6.norm.weight", "model/exits.12.norm.weight"),
            one("model/exits.6.norm.weight"),
            "has exits 6 12, the model 6: give --exit-layer-nums 6 12, or leave it out and give --use-checkpoint-args",
        ),
        (one("model/a"), one("model/a", "model/exits.6.norm.weight"), "has exits none, the model 6: add exits"),
        (one("model/layers.0.a", "model/layers.1.a"), one("model/layers.0.a"), "2 layers, the model 1: give --num-l"),
        (one(), one("model/output.weight"), "--untie-embeddings-and-output-weights"),
        (one(), one("optimizer/exp_avg/a"), "--no-load-optim or --finetune"),
        ({"model/embedding.word.weight": ((3,), torch.float32)}, one("model/embedding.word.weight"), "tokenizers do"),
    ],
)
def test_hints(found, wanted, hint):
    with pytest.raises(CheckpointError, match="hint: ") as raised:
        check(found, wanted, "it")
    assert hint in str(raised.value)


def test_padding_may_differ_in_rows_but_not_in_width():
    name = "model/output.weight.padding"
    for theirs, ours, kept in [(4, 2, 2), (2, 4, 2), (0, 3, 0), (3, 0, 0)]:
        source = {name: torch.ones(theirs, 2)} if theirs else {}
        target = {name: torch.full((ours, 2), 7.0)} if ours else {}
        copy_into(source, target, "it")
        for tensor in target.values():
            assert (tensor[:kept] == 1).all()
            assert (tensor[kept:] == 0).all()
    with pytest.raises(CheckpointError, match="of another shape"):
        copy_into({name: torch.ones(2, 3)}, {name: torch.ones(2, 2)}, "it")


def test_copy_padding_alone():
    target = torch.ones(3, 2)
    copy_padding(None, target)
    assert not target.any()


def test_only_model_weights_are_converted_and_only_when_asked():
    source = {"model/a": random(4), "optimizer/exp_avg/a": random(4)}
    target = {"model/a": random(4, dtype=torch.bfloat16), "optimizer/exp_avg/a": random(4)}
    with pytest.raises(CheckpointError, match="model/a: checkpoint float32, model bfloat16"):
        copy_into(source, target, "it")
    copy_into(source, target, "it", convert=True)
    assert torch.equal(target["model/a"], source["model/a"].bfloat16())
    target["optimizer/exp_avg/a"] = random(4, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="optimizer/exp_avg/a: checkpoint float32, model bfloat16"):
        copy_into(source, target, "it", convert=True)
    with pytest.raises(CheckpointError, match="int64"):
        copy_into({"model/a": torch.ones(4, dtype=torch.int64)}, {"model/a": random(4)}, "it", convert=True)


def test_what_is_ignored_need_not_have_a_target():
    source = {"model/a": random(2), "optimizer/exp_avg/a": random(2)}
    target = {"model/a": random(2)}
    with pytest.raises(CheckpointError, match="not in the model"):
        copy_into(source, target, "it")
    copy_into(source, target, "it", ignore=("optimizer/",))
    assert torch.equal(source["model/a"], target["model/a"])


def test_a_state_starts_empty():
    assert RunState() == RunState({}, {})
    assert entries({"a": torch.ones(2, 3)}) == {"a": ((2, 3), torch.float32)}
