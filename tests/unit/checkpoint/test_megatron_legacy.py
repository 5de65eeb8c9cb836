import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import megatron_legacy
from megatron.errors import CheckpointError

VOCAB, HEADS, HIDDEN = 11, 4, 8


def read(root: Path, **options):
    return megatron_legacy.read(root / "iter_0000007", **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"untied": True, "gated": True, "bias": False},
        {"exits": (2, 3), "exit_norm": True},
        {"exits": (1, 4), "exit_mlp": True, "exit_norm": True, "gated": True},
        {"exits": (2, 4), "exit_block": True, "exit_norm": True, "untied": True, "untied_exits": True},
        {"exits": (3, 1), "untied_exits": True, "exit_mlp": True, "gated": True, "bias": False},
    ],
)
def test_every_layout_gives_the_whole_tensors(tmp_path, legacy, recipe, options, tp, pp):
    expected = legacy(tmp_path, recipe(tp=tp, pp=pp, optimizer="fp32", **options))
    state = read(tmp_path)
    assert_same(state.tensors, expected)
    assert state.facts["optimizer_step"] == 7


def test_interleaved_chunks_are_numbered_chunk_by_chunk(tmp_path, legacy, recipe):
    expected = legacy(tmp_path, recipe(layers=8, pp=2, chunks=2, tp=2, optimizer="fp32"))
    assert_same(read(tmp_path).tensors, expected)


def test_mixed_precision_state_has_masters_and_scaler(tmp_path, legacy, recipe):
    expected = legacy(tmp_path, recipe(tp=2, pp=2, exits=(2,), exit_norm=True, optimizer="mixed", gated=True))
    state = read(tmp_path)
    assert_same(state.tensors, expected)
    assert any(name.startswith("optimizer/master/layers.3.mlp.gate") for name in state.tensors)
    assert state.facts["grad_scaler"] == {"scale": 8.0, "growth_tracker": 3, "hysteresis_tracker": -2}


def test_tuning_has_state_for_exits_only(tmp_path, legacy, recipe):
    tuned = recipe(exits=(2, 4), exit_norm=True, exit_mlp=True, untied=True, untied_exits=True)
    expected = legacy(tmp_path, replace(tuned, optimizer="fp32", tune_exit=True, tp=2))
    state = read(tmp_path)
    assert_same(state.tensors, expected)
    assert {name.split("/")[2].split(".")[0] for name in state.tensors if name.startswith("optimizer/")} == {"exits"}


def test_padding_rows_are_kept_apart(tmp_path, legacy, recipe):
    expected = legacy(tmp_path, recipe(exits=(2,), untied_exits=True, optimizer="fp32", tp=2))
    tensors = read(tmp_path, vocab_size=VOCAB).tensors
    for name in ("model/embedding.word.weight", "optimizer/exp_avg/exits.2.output.weight"):
        assert torch.equal(tensors[name], expected[name][:VOCAB])
        assert torch.equal(tensors[f"{name}.padding"], expected[name][VOCAB:])
    assert "model/embedding.position.weight.padding" not in tensors
    assert "model/embedding.word.weight.padding" not in read(tmp_path, vocab_size=16).tensors
    with pytest.raises(CheckpointError, match="16 rows, the tokenizer 17 ids"):
        read(tmp_path, vocab_size=17)


def test_facts_are_plain_json(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(exits=(2,), optimizer="fp32", args={"betas": (0.9, 0.95), "scale": torch.tensor(2.0)}))
    facts = read(tmp_path).facts
    assert facts["args"]["model_type"] in ("ModelType(1)", "ModelType.encoder_or_decoder")  # as the Python writes it
    assert facts["args"]["params_dtype"] == "float32"
    assert facts["args"]["betas"] == [0.9, 0.95]
    assert facts["args"]["scale"] == 2.0
    assert (facts["iteration"], facts["consumed_train_samples"], facts["consumed_valid_samples"]) == (7, 112, 0)
    assert (facts["opt_param_scheduler"]["max_lr"], facts["opt_param_scheduler"]["num_steps"]) == (0.1, 112)


def test_files_older_than_the_count_of_samples(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(args={"global_batch_size": 5}))
    edit(tmp_path, lambda s: delattr(s["args"], "consumed_train_samples"))
    assert read(tmp_path).facts["consumed_train_samples"] == 35


def test_arguments_alone(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(exits=(2,), pp=2))
    args = megatron_legacy.read_args(tmp_path / "iter_0000007")
    assert (args["num_layers"], args["exit_layer_nums"]) == (4, [2])


def test_optimizer_can_be_left_aside(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(optimizer="fp32"))
    assert all(name.startswith("model/") for name in read(tmp_path, with_optimizer=False).tensors)


def test_sharded_optimizer_is_refused_with_the_mend(tmp_path, legacy, recipe):
    expected = legacy(tmp_path, recipe(optimizer="sharded", tp=2))
    with pytest.raises(CheckpointError, match=r"distrib_optim.pt.*--no-load-optim"):
        read(tmp_path)
    assert_same(read(tmp_path, with_optimizer=False).tensors, expected)
    for file in tmp_path.rglob("distrib_optim.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="sharded"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize(("version", "tp"), [(None, 1), (0, 2), (1.0, 1), (1.0, 2), (2.0, 2)])
def test_old_orders_of_qkv_rows(tmp_path, legacy, recipe, version, tp, kind):
    rows = legacy(tmp_path, recipe(tp=tp, version=version))[f"model/layers.1.attention.qkv.{kind}"]
    found = read(tmp_path).tensors[f"model/layers.1.attention.qkv.{kind}"]
    heads, head = HEADS // tp, HIDDEN // HEADS
    for rank, (shard, ours) in enumerate(zip(rows.chunk(tp), found.chunk(tp), strict=True)):
        for n in range(heads):
            for part in range(3):
                for d in range(head):
                    old = {
                        None: (part * heads + n) * head + d,
                        0: (part * heads + n) * head + d,
                        1.0: (n * head + d) * 3 + part,
                        2.0: (n * 3 + part) * head + d,
                    }[version]
                    assert torch.equal(ours[(n * 3 + part) * head + d], shard[old]), (rank, n, part, d)


def test_names_of_older_releases(tmp_path, legacy, recipe):
    expected = legacy(tmp_path, recipe())
    path = tmp_path / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    encoder = state["model"]["language_model"].pop("encoder")
    state["model"]["language_model"]["transformer"] = {
        name.replace("self_attention", "attention").replace("norm", "layernorm"): tensor
        for name, tensor in encoder.items()
    }
    torch.save(state, path)
    assert_same(read(tmp_path).tensors, expected)


def test_without_arguments_the_directories_tell_the_layout(tmp_path, legacy, recipe):
    expected = legacy(tmp_path, recipe(tp=2, pp=2))
    for path in tmp_path.rglob("*.pt"):
        state = torch.load(path, weights_only=False)
        del state["args"]
        torch.save(state, path)
    assert_same(read(tmp_path).tensors, expected)


def test_missing_ranks_are_named(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(tp=2, pp=2))
    shutil.rmtree(tmp_path / "iter_0000007/mp_rank_01_000")
    (tmp_path / "iter_0000007/mp_rank_00_001/model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks mp_rank_00_001, mp_rank_01_000: copy"):
        read(tmp_path)


def test_partial_tuning_output_says_where_the_rest_is(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(pp=2, exits=(1,), untied_exits=True, untied=True, tune_exit=True))
    shutil.rmtree(tmp_path / "iter_0000007/mp_rank_00_001")
    with pytest.raises(CheckpointError, match="lacks mp_rank_00_001: tuning exits"):
        read(tmp_path)


@pytest.mark.parametrize("names", [[], ["mp_rank_01"], ["mp_rank_00_000_000"], ["mp_rank_00", "mp_rank_00_000"]])
def test_strange_rank_directories_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"lacks mp_rank_00|experts|mixes"):
        megatron_legacy.read(tmp_path)


def edit(root: Path, change) -> None:
    path = root / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model"), "holds no model"),
        (lambda s: setattr(s["args"], "num_layers", 5), "holds 4 layers, its arguments say 5"),
        (lambda s: setattr(s["args"], "tensor_model_parallel_size", 10**9), "tensor_model_parallel_size"),
        (lambda s: s["model"]["language_model"].update(pooler={"w": torch.ones(1)}), "pooler.w, which no"),
        (lambda s: setattr(s["args"], "exit_layer_nums", [9]), "exit_output_layer.0.weight, which no"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "belongs to other parameters"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "belongs to other parameters"),
        (lambda s: s["optimizer"].update(state={}, param_groups=[]), "belongs to other parameters"),
        (lambda s: s.update(optimizer=None), "no optimizer state"),
        (lambda s: s.update(args=[1]), "no namespace"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, legacy, recipe, change, message):
    legacy(tmp_path, recipe(exits=(2,), untied_exits=True, optimizer="fp32"))
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def arg(name, value):
    return lambda s: setattr(s["args"], name, value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda s: s.update(iteration=None), "iteration is None"),
        (lambda s: s.update(iteration="7"), "iteration is '7'"),
        (lambda s: s.update(iteration=-1), "iteration is -1"),
        (lambda s: s.update(checkpoint_version="three"), "checkpoint_version is 'three'"),
        (lambda s: s.update(model=[1]), "model is a list"),
        (lambda s: s.update(model0=s.pop("model"), model1=None), "model1 is None"),
        (arg("num_layers", "8"), "num_layers is '8'"),
        (arg("exit_layer_nums", "2 4"), "exit_layer_nums is '2 4'"),
        (arg("exit_layer_nums", ["2"]), "exit_layer_nums is '2'"),
        (arg("consumed_train_samples", "many"), "consumed_train_samples is 'many'"),
        (arg("consumed_valid_samples", [1]), "consumed_valid_samples is a list"),
        (arg("pipeline_model_parallel_size", True), "pipeline_model_parallel_size is True"),
        (lambda s: s.update(opt_param_scheduler=[1]), "opt_param_scheduler is a list"),
        (lambda s: s["opt_param_scheduler"].update(max_lr="big"), "opt_param_scheduler: max_lr is 'big'"),
        (lambda s: s["opt_param_scheduler"].update(num_steps=0.5), "opt_param_scheduler: num_steps is 0.5"),
        (lambda s: s.update(optimizer=[1]), "no optimizer state"),
        (lambda s: s["optimizer"].update(optimizer=[1]), "optimizer is a list"),
        (lambda s: s["optimizer"].pop("param_groups"), "lacks param_groups"),
        (lambda s: s["optimizer"].update(param_groups=["x"]), "param_groups"),
        (lambda s: s["optimizer"]["param_groups"][0].update(params="all"), "params is 'all'"),
        (lambda s: s["optimizer"]["param_groups"][0].update(params=[[0]]), "params are no numbers"),
        (lambda s: s["optimizer"].update(state=[1]), "state is a list"),
        (lambda s: s["optimizer"]["state"].update({0: 1}), "entry 0 is no mapping"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=1.0), "entry 0 holds a moment that is no tensor"),
        (lambda s: [group.pop("step") for group in s["optimizer"]["param_groups"]], "lacks step.*--no-load-optim"),
        (lambda s: s["optimizer"]["param_groups"][0].update(step="x"), "step is 'x'"),
        (lambda s: s["optimizer"].update(grad_scaler=1.0), "grad_scaler is a float"),
        (lambda s: s["optimizer"].update(fp32_from_fp16_params=[1]), "fp32 weights belong"),
    ],
)
def test_odd_fields_are_named(tmp_path, legacy, recipe, change, field):
    legacy(tmp_path, recipe(exits=(2,), optimizer="fp32"))
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"iter_0000007.*{field}"):
        read(tmp_path)


def test_arguments_that_are_none_are_as_absent(tmp_path, legacy, recipe):
    unset = dict.fromkeys(("num_layers", "exit_layer_nums", "consumed_train_samples", "consumed_valid_samples"))
    expected = legacy(tmp_path, recipe(args={**unset, "global_batch_size": 5}))
    state = read(tmp_path)
    assert_same(state.tensors, expected)
    assert (state.facts["consumed_train_samples"], state.facts["consumed_valid_samples"]) == (35, 0)


def test_a_scheduler_or_scaler_that_lacks_keys_is_left_out(tmp_path, legacy, recipe, caplog):
    legacy(tmp_path, recipe(optimizer="mixed"))
    edit(tmp_path, lambda s: (s["opt_param_scheduler"].pop("max_lr"), s["optimizer"]["grad_scaler"].pop("scale")))
    facts = read(tmp_path).facts
    assert (facts["opt_param_scheduler"], facts["grad_scaler"]) == (None, None)
    assert "opt_param_scheduler lacks max_lr and is left out" in caplog.text
    assert "grad_scaler lacks scale and is left out" in caplog.text


def test_an_odd_optimizer_is_not_looked_at_where_it_is_left_aside(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(optimizer="fp32"))
    edit(tmp_path, lambda s: s.update(optimizer=[1]))
    facts = read(tmp_path, with_optimizer=False).facts
    assert (facts["optimizer_step"], facts["grad_scaler"]) == (None, None)


def test_step_of_torchs_adam_and_of_sgd(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(optimizer="fp32"))

    def per_entry(s):
        for group in s["optimizer"]["param_groups"]:
            del group["step"]
        for entry in s["optimizer"]["state"].values():
            entry["step"] = torch.tensor(6.0)

    edit(tmp_path, per_entry)
    assert read(tmp_path).facts["optimizer_step"] == 6

    def momentum(s):
        state = s["optimizer"]["state"]
        s["optimizer"]["state"] = {n: {"momentum_buffer": entry["exp_avg"]} for n, entry in state.items()}

    edit(tmp_path, momentum)
    state = read(tmp_path)
    assert state.facts["optimizer_step"] == 7  # SGD counts none: the iteration
    assert "optimizer/momentum_buffer/final_norm.weight" in state.tensors


@pytest.mark.parametrize("name", ["self_attention.query_key_value.weight", "mlp.dense_4h_to_h.bias"])
def test_shards_of_other_shapes_are_refused(tmp_path, legacy, recipe, name):
    legacy(tmp_path, recipe(tp=2))
    key = f"layers.0.{name}"
    edit(tmp_path, lambda s: s["model"]["language_model"]["encoder"].update({key: torch.ones(5, 3)}))
    with pytest.raises(CheckpointError, match=r"iter_0000007: the shards of layers\.0\..* don't fit .*\[5, 3\]"):
        read(tmp_path)


def test_masters_of_other_shapes_are_refused(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(optimizer="mixed"))
    edit(tmp_path, lambda s: s["optimizer"]["fp32_from_fp16_params"][1].pop())
    with pytest.raises(CheckpointError, match="fp32 weights belong to other parameters"):
        read(tmp_path)


def test_old_rows_need_the_number_of_heads(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(version=1.0, args={"num_attention_heads": None}))
    with pytest.raises(CheckpointError, match="--num-attention-heads"):
        read(tmp_path)


def test_unequal_copies_are_reported(tmp_path, legacy, recipe, caplog):
    expected = legacy(tmp_path, recipe(tp=2, pp=2))
    path = tmp_path / "iter_0000007/mp_rank_01_001/model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["word_embeddings_for_head"]["weight"].zero_()
    state["model"]["language_model"]["encoder"]["final_norm.bias"].zero_()
    torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        assert_same(read(tmp_path).tensors, expected)
    assert "final_norm.bias" in caplog.text
    assert "word_embeddings_for_head" in caplog.text


def test_equal_copies_are_not_reported(tmp_path, legacy, recipe, caplog):
    legacy(tmp_path, recipe(tp=2, pp=4, exits=(2,), exit_norm=True, optimizer="mixed"))
    read(tmp_path)
    assert not caplog.records


def test_shards_that_differ_in_names_are_refused(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(tp=2))
    edit(tmp_path, lambda s: s["model"]["language_model"]["encoder"].pop("final_norm.bias"))
    with pytest.raises(CheckpointError, match="differ in names"):
        read(tmp_path)
