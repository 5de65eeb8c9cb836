"""Files in Megatron's format: what stands where, what they hold, and what they can't."""

import gc
import os
import pickletools
import resource
import zipfile
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron import faults
from megatron.checkpoint import megatron_legacy
from megatron.checkpoint.convert import megatron_target
from megatron.checkpoint.convert.base import Layout
from megatron.checkpoint.convert.megatron_source import MegatronSource
from megatron.checkpoint.find import recognise
from megatron.checkpoint.safe import read_legacy
from megatron.checkpoint.stored_run import stored_config
from megatron.config.model import ExitConfig
from megatron.errors import CheckpointError, ConfigError, StorageError
from tests.unit.checkpoint.convert.conftest import (
    ITERATION,
    KINDS,
    PADDED,
    VOCAB,
    assert_equal,
    nothing,
    read_model,
    toy,
    write_megatron,
)
from tests.unit.checkpoint.test_storage_limits import in_child

LAYOUTS = [(1, 1), (2, 2), (1, 4)]


def flat(part: dict, above: str = "") -> dict[str, torch.Tensor]:
    """A file's `model` by dotted names."""
    found = {}
    for key, value in part.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_exit_in_every_layout(tmp_path, kind, tp, pp):
    source = toy(kind, "gpt" if tp == pp else "llama")  # tp=2 pp=2 of a gated model: test_convert.py
    write_megatron(source, tmp_path, tp, pp)
    assert_equal(read_model(tmp_path), source.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_kept(tmp_path, dtype):
    source = toy("all", "llama", dtype)
    directory = write_megatron(source, tmp_path, 2, 2)
    assert_equal(read_model(tmp_path), source.tensors)
    args = torch.load(directory / "mp_rank_00_000/model_optim_rng.pt", weights_only=False)["args"]
    assert args.params_dtype is dtype


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("exits", [(), (2, 3)])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_names_and_cuts_are_those_of_the_original(tmp_path, legacy, recipe, exits, gated, tp, pp):
    """A checkpoint laid out from the format's description, taken apart and written again: every file the same."""
    shape = {"num_attention_heads": 4, "hidden_size": 8, "seq_length": 6, "ffn_hidden_size": 16}
    parts = {"exit_norm": bool(exits), "exit_mlp": bool(exits), "exit_block": bool(exits), "untied_exits": True}
    flags = {f"use_{name}": value for name, value in parts.items() if name.startswith("exit")}
    args = shape | flags | {"untie_exit_output_weights": True, "make_vocab_size_divisible_by": 8}
    legacy(tmp_path / "in", recipe(tp=tp, pp=pp, exits=exits, gated=gated, args=args, **parts))
    source = MegatronSource(recognise(tmp_path / "in").directory)
    megatron_target.write(source, tmp_path / "out", Layout(), nothing)
    files = sorted(path.relative_to(tmp_path / "in") for path in (tmp_path / "in").rglob("*.pt"))
    assert files == sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.pt"))
    for file in files:
        theirs, ours = (read_legacy(tmp_path / side / file) for side in ("in", "out"))
        assert_equal(flat(ours["model"]), flat(theirs["model"]))
        assert (ours["iteration"], ours["checkpoint_version"]) == (7, 3.0)
        assert ours.keys() == {"args", "checkpoint_version", "iteration", "model"}
        kept = {name: value for name, value in vars(theirs["args"]).items() if name != "model_type"}
        assert kept.items() <= vars(ours["args"]).items()


def test_a_tied_embedding_is_copied_to_stages_with_a_head(tmp_path):
    directory = write_megatron(toy("tied"), tmp_path, 2, 4)  # exits at 1 and 3: stages 0 and 2
    for tp in range(2):
        for pp, copied in enumerate((False, False, True, True)):
            model = read_legacy(directory / f"mp_rank_{tp:02d}_{pp:03d}" / "model_optim_rng.pt")["model"]
            assert ("word_embeddings_for_head" in model) == copied


def test_padding_is_kept_and_made_up_with_zeros(tmp_path):
    source = toy("untied", "llama")
    del source.tensors["exits.2.output.weight.padding"]
    write_megatron(source, tmp_path, 2)
    found = megatron_legacy.read(recognise(tmp_path).directory).tensors
    assert torch.equal(found["model/output.weight"][VOCAB:], source.tensors["output.weight.padding"])
    assert found["model/exits.2.output.weight"].shape[0] == PADDED
    assert not found["model/exits.2.output.weight"][VOCAB:].any()


@pytest.mark.parametrize(("divisor", "tp", "rows"), [(1, 1, 60), (1, 4, 60), (16, 1, 64), (16, 2, 64), (128, 1, 128)])
def test_the_rule_of_padding(tmp_path, divisor, tp, rows):
    source = toy()
    model = replace(source.config.model, make_vocab_size_divisible_by=divisor)
    source.config = replace(source.config, model=model)
    directory = write_megatron(source, tmp_path, tp)
    weight = read_legacy(directory / "mp_rank_00" / "model_optim_rng.pt")["model"]["language_model"]["embedding"]
    assert weight["word_embeddings"]["weight"].shape[0] == rows // tp


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("kind", ["norm", "all", "pre"])
def test_the_arguments_say_which_model_it_is(tmp_path, kind, family):
    source = toy(kind, family)
    write_megatron(source, tmp_path, 2, 2)
    stored = stored_config(recognise(tmp_path))
    for name in ("head_dim", "num_kv_heads", "ffn_size", "activation", "qkv_bias", "normalization", "max_positions"):
        assert getattr(stored.model, name) == getattr(source.config.model, name)
    assert (stored.exits, stored.tokenizer) == (source.config.exits, source.config.tokenizer)
    facts = megatron_legacy.read(recognise(tmp_path).directory).facts
    assert (facts["iteration"], facts["consumed_train_samples"]) == (ITERATION, 112)


def test_a_file_holds_plain_types_alone(tmp_path):
    directory = write_megatron(toy("all"), tmp_path)
    with zipfile.ZipFile(directory / "mp_rank_00" / "model_optim_rng.pt") as archive:
        assert archive.testzip() is None
        operations = list(pickletools.genops(archive.read("archive/data.pkl")))
    named = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert named == {
        "argparse Namespace", "collections OrderedDict", "torch float32", "torch FloatStorage",
        "torch._utils _rebuild_tensor_v2",
    }  # fmt: skip
    content = torch.load(directory / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    assert isinstance(content["args"], Namespace) and not hasattr(content["args"], "model_type")


UNHOLDABLE = {
    "qkv bias": ({"add_bias_linear": False, "add_qkv_bias": True}, "--add-qkv-bias"),
    "qk norm": ({"qk_layernorm": True}, "--qk-layernorm"),
    "window": ({"window_size": 5}, "--window-size 5"),
    "rope scaling": ({"use_rope_scaling": True, "position_embedding_type": "rope"}, "--use-rope-scaling"),
    "geglu": ({"geglu": True}, "--geglu"),
}


@pytest.mark.parametrize("name", UNHOLDABLE)
def test_what_the_format_cannot_hold_is_named(tmp_path, name):
    changes, said = UNHOLDABLE[name]
    with pytest.raises(ConfigError, match=f"can't hold this model: .*{said}"):
        write_megatron(toy(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_exits_of_the_final_norm_are_refused(tmp_path):
    source = toy("tied")
    source.config = replace(source.config, exits=ExitConfig(exit_layer_nums=(1, 3), exit_norm="final"))
    with pytest.raises(ConfigError, match=r"--exit-norm final.*--to native"):
        write_megatron(source, tmp_path)


@pytest.mark.parametrize(
    ("tp", "pp", "said"),
    [(3, 1, "tp=3 does not divide --num-attention-heads 4"), (4, 1, "tp=4 does not divide --num-query-groups 2"),
     (1, 3, "pp=3 does not divide --num-layers 4")],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(tmp_path, tp, pp, said):
    with pytest.raises(ConfigError, match=said):
        write_megatron(toy(family="llama"), tmp_path, tp, pp)
    assert not list(tmp_path.iterdir())


def test_a_tensor_is_read_once_a_stage(tmp_path):
    source = toy("untied", "llama")
    write_megatron(source, tmp_path, 2, 2)
    assert set(source.reads.values()) == {1}


def test_nothing_is_replaced(tmp_path):
    write_megatron(toy(), tmp_path)
    before = read_model(tmp_path)
    with pytest.raises(StorageError, match=r"iter_0000007 exists and is not replaced: give another --save-dir"):
        write_megatron(toy(), tmp_path)
    assert_equal(read_model(tmp_path), before)


def test_what_does_not_pass_the_check_is_never_there(tmp_path):
    def refuse(path):
        assert len(list(path.rglob("*.pt"))) == 4
        raise CheckpointError("not what was read")

    with pytest.raises(CheckpointError, match="not what was read"):
        megatron_target.write(toy("all"), tmp_path, Layout(2, 2), refuse)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["enospc", "erofs"])
def test_a_write_that_fails_anywhere_leaves_nothing(tmp_path, action):
    source = toy("mlp")
    with faults.armed() as passed:
        write_megatron(source, tmp_path / "count", 2, 2)
    names = set(passed)
    assert {"legacy.mkdir", "legacy.open", "legacy.write", "commit.rename"} <= names
    for name in sorted(names):
        root = tmp_path / f"{action} {name}"
        with faults.armed(f"{name}@{passed.count(name) // 2 + 1}:{action}"):
            if name == "commit.replace_file" or name.startswith("file."):
                continue  # the tracker is a mere hint, and comes last
            with pytest.raises(StorageError, match="cannot write"):
                write_megatron(source, root, 2, 2)
        assert not root.exists() or not list(root.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_that_may_not_grow_are_one_error(tmp_path):
    """Storage that refuses for real, at sizes within and at the end of the files."""
    source = toy("mlp", "llama")
    size = max(path.stat().st_size for path in write_megatron(source, tmp_path / "count", 1, 2).rglob("*.pt"))

    def refused(root, limit):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        with pytest.raises(StorageError, match=r"cannot write .*model_optim_rng\.pt: .*File too large"):
            write_megatron(source, root, 1, 2)
        assert not list(root.iterdir())
        gc.collect()

    for number, limit in enumerate((0, 1, size // 3, size // 2, size - 1)):
        assert in_child(lambda root=tmp_path / str(number), limit=limit: refused(root, limit)) == 0
