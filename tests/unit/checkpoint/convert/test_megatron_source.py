"""Files in Megatron's format read a tensor at a time: the same as those who read them whole find."""

import pytest
import torch

from megatron.checkpoint import megatron_legacy
from megatron.checkpoint.convert.megatron_source import MegatronSource
from megatron.checkpoint.safe import read_legacy, read_span
from megatron.checkpoint.state import MODEL
from megatron.errors import CheckpointError
from tests.unit.checkpoint.convert.conftest import assert_equal
from tests.unit.checkpoint.pickles import PAYLOADS

ARGS = {"num_attention_heads": 4, "hidden_size": 8, "seq_length": 6, "ffn_hidden_size": 16}


def opened(root) -> MegatronSource:
    return MegatronSource(root / "iter_0000007")


def all_of(source: MegatronSource) -> dict[str, torch.Tensor]:
    found = {name: source.read(name) for name in source.specs()}
    moments = {name: source.read(name) for name in source.moments()}
    for name, spec in {**source.specs(), **source.moments()}.items():
        tensor = (found | moments)[name]
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), tensor.dtype)
    return {MODEL + name: tensor for name, tensor in found.items()} | moments


OPTIONS = {
    "plain": {},
    "four ranks": {"tp": 2, "pp": 2, "exits": (2, 3), "exit_norm": True, "exit_mlp": True, "gated": True},
    "chunks": {"layers": 8, "tp": 2, "pp": 2, "chunks": 2, "untied": True},
    "version 0": {"tp": 2, "version": 0.0},
    "version 1": {"tp": 2, "version": 1.0},
    "masters": {"tp": 2, "pp": 2, "optimizer": "mixed", "exits": (4,), "untied_exits": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_as_read_at_once(tmp_path, legacy, recipe, name):
    legacy(tmp_path, recipe(**({"optimizer": "fp32", "args": ARGS} | OPTIONS[name])))
    whole = megatron_legacy.read(tmp_path / "iter_0000007")
    source = opened(tmp_path)
    assert_equal(all_of(source), whole.tensors)
    assert source.training_facts()["optimizer_step"] == whole.facts["optimizer_step"] == 7
    assert (source.iteration, source.facts["args"]) == (7, whole.facts["args"])


def test_copies_that_differ_are_said(tmp_path, legacy, recipe, caplog):
    legacy(tmp_path, recipe(tp=2, pp=2, args=ARGS))
    for name, change in (("mp_rank_01_001", "word_embeddings_for_head"), ("mp_rank_01_000", "input_norm")):
        path = tmp_path / "iter_0000007" / name / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        model = state["model"] if change in state["model"] else state["model"]["language_model"]
        tensor = model[change]["weight"] if change in model else model["encoder"][f"layers.0.{change}.weight"]
        tensor += 1
        torch.save(state, path)
    first = all_of(opened(tmp_path))
    assert "copies that should be equal differ, the first is taken: word_embeddings_for_head.weight" in caplog.text
    assert "the first is taken: layers.0.input_norm.weight" in caplog.text
    assert_equal(first, megatron_legacy.read(tmp_path / "iter_0000007").tensors)


def test_files_older_than_zip_are_read_at_once(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe(args=ARGS))
    path = tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    expected = all_of(opened(tmp_path))
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    assert_equal(all_of(opened(tmp_path)), expected)


@pytest.mark.parametrize("payload", ["os.system", "eval", "numpy objects"])
def test_nothing_in_a_file_runs(tmp_path, payload):
    mark, file = tmp_path / "mark", tmp_path / "model_optim_rng.pt"
    torch.save({"args": PAYLOADS[payload](mark), "model": {"w": torch.ones(2)}}, file)
    with pytest.raises(CheckpointError, match=r"refused|numpy arrays"):
        read_legacy(file, data=False)
    assert not mark.exists()


def test_a_tensor_beyond_the_end_of_its_file_is_an_error(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"w": torch.ones(300)}, file)
    tensor = read_legacy(file, data=False)["w"]
    assert torch.equal(read_span(file, tensor[100:200]), torch.ones(100))
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged: it ends within a tensor"):
        read_span(file, tensor)


def test_a_tensor_laid_out_by_columns_is_refused(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3, 4).t()}, file)
    with pytest.raises(CheckpointError, match="not laid out row by row"):
        read_span(file, read_legacy(file, data=False)["w"])


def test_an_optimizer_of_other_parameters_stays_behind(tmp_path, legacy, recipe, caplog):
    legacy(tmp_path, recipe(optimizer="fp32", args=ARGS))
    path = tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(state, path)
    assert opened(tmp_path).moments() == {}
    assert "the optimizer's state stays behind" in caplog.text
