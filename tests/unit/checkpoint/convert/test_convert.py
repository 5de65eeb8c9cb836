"""Whole conversions: there and back, with the optimizer's state or without, verified, refused where they must be."""

from dataclasses import replace
from pathlib import Path
from threading import Lock
from weakref import finalize

import pytest
import torch

from megatron.checkpoint import megatron_legacy, native
from megatron.checkpoint.convert import convert as module
from megatron.checkpoint.convert.base import Layout
from megatron.checkpoint.convert.derived import Watched
from megatron.checkpoint.convert.exits import NewExits
from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.find import recognise
from megatron.checkpoint.run_facts import read_run_facts
from megatron.checkpoint.safe import read_legacy
from megatron.config.data import TokenizerConfig
from megatron.config.stored import from_checkpoint
from megatron.errors import CheckpointError, ConfigError, StorageError
from megatron.inference.build import load_model
from megatron.testing.tiny import evaluate_heads, random_batch
from tests.unit.checkpoint.convert.conftest import (
    ITERATION,
    KINDS,
    VOCAB,
    WORDS,
    Memory,
    assert_equal,
    quietly,
    read_model,
    toy,
    write_megatron,
    write_native,
)

NULL = {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB - 1}
TEN = {"tokenizer_type": "NullTokenizer", "vocab_size": 10}
ARGS = {"num_attention_heads": 4, "hidden_size": 8, "seq_length": 6, "ffn_hidden_size": 16, "kv_channels": 2}


def losses(directory: Path, tokenizer: TokenizerConfig | None = None) -> dict[str, float]:
    model, _, _ = load_model(directory, device="cpu", tokenizer=tokenizer)
    return {name: score.loss.item() for name, score in evaluate_heads(model, random_batch(vocab_size=VOCAB)).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path, kind, job):
    """Native to Megatron's, cut in four, to native: every tensor as it was, and the same model to those who load it."""
    source = toy(kind, "llama" if len(kind) % 2 else "gpt")
    write_native(source, tmp_path / "first")
    report = quietly(job(tmp_path / "first", "native", "megatron", layout=Layout(2, 2), save=tmp_path / "files"))
    assert (report.directory, report.with_optimizer) == (tmp_path / "files/iter_0000007", False)
    quietly(job(tmp_path / "files", "megatron", "native"))
    assert_equal(read_model(tmp_path / "out"), source.tensors)
    if kind in ("tied", "all", "pre"):
        expected = losses(tmp_path / "first")
        assert losses(tmp_path / "files", WORDS) == expected
        assert losses(tmp_path / "out") == expected  # the tokenizer came along in the arguments
    exits = from_checkpoint(read_run_facts(tmp_path / "out/iter_0000007")["config"]).exits
    assert exits == source.config.exits


@pytest.mark.parametrize("optimizer", ["fp32", "mixed"])
def test_the_optimizers_state_goes_where_parameters_stay(tmp_path, legacy, recipe, optimizer, job):
    expected = legacy(tmp_path / "in", recipe(tp=2, pp=2, exits=(2,), optimizer=optimizer, gated=True, args=ARGS))
    report = quietly(job(tmp_path / "in", "megatron", "native", tokenizer=TEN))
    assert report.with_optimizer
    found = native.read(report.directory)
    whole = {
        name: torch.cat([tensor, found.tensors[f"{name}.padding"]]) if f"{name}.padding" in found.tensors else tensor
        for name, tensor in found.tensors.items() if not name.endswith(".padding")
    }  # fmt: skip
    assert found.tensors["model/embedding.word.weight"].shape[0] == 11
    assert_equal(whole, expected)
    facts = read_run_facts(report.directory)
    assert (facts["optimizer_step"], facts["consumed_samples"], facts["optimizer_samples"]) == (7, 112, 112)
    assert facts["grad_scaler"]["scale"] == (8.0 if optimizer == "mixed" else 1.0)
    assert facts["opt_param_scheduler"]["learning_rate"]["max_lr"] == 0.1


@pytest.mark.parametrize("case", ["exits", "layout", "sharded"])
def test_the_optimizers_state_stays_behind_elsewhere(tmp_path, legacy, recipe, case, job, caplog):
    legacy(tmp_path / "in", recipe(optimizer="sharded" if case == "sharded" else "fp32", args=ARGS))
    changes = {
        "exits": {"add": NewExits((2,)), "tokenizer": TEN},
        "layout": {"layout": Layout(2, 2)},
        "sharded": {"tokenizer": TEN},
    }[case]
    with caplog.at_level("INFO", "megatron"):
        report = quietly(job(tmp_path / "in", "megatron", "megatron" if case == "layout" else "native", **changes))
    assert not report.with_optimizer
    said = "distrib_optim.pt" if case == "sharded" else "the optimizer's state is not carried along"
    assert said in caplog.text
    if case == "layout":
        assert "optimizer" not in read_legacy(report.directory / "mp_rank_00_000/model_optim_rng.pt")
    else:
        assert not [name for name in native.tensor_index(report.directory) if name.startswith("optimizer/")]


def test_a_native_checkpoint_gets_exits_and_keeps_its_facts(tmp_path, job):
    source = toy("norm")
    source.facts |= {"run": 3, "skipped_steps": 2}
    write_native(source, tmp_path / "in")
    report = quietly(job(tmp_path / "in", "native", "native", add=NewExits((2,), norm="own")))
    facts = read_run_facts(report.directory)
    assert (facts["run"], facts["skipped_steps"], facts["iteration"]) == (3, 2, ITERATION)
    assert facts["config"]["exits"]["exit_layer_nums"] == [1, 2, 4]
    before, after = losses(tmp_path / "in"), losses(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_a_true_vocabulary_decides_the_padding(tmp_path, job):
    source = toy()
    write_megatron(source, tmp_path / "in")
    quietly(job(tmp_path / "in", "megatron", "megatron", vocab_size=50, layout=Layout(4, 1)))
    rows = megatron_legacy.read(recognise(tmp_path / "out").directory).tensors["model/embedding.word.weight"]
    assert rows.shape[0] == 64  # a multiple of 16 x 4 that holds 50
    whole = torch.cat([source.tensors["embedding.word.weight"], source.tensors["embedding.word.weight.padding"]])
    assert torch.equal(rows, whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 64}}, "has 64 rows, the tokenizer 65 ids"),
        ({"tokenizer": NULL, "vocab_size": 50}, "--true-vocab-size 50: the tokenizer has 60 ids"),
        ({"tokenizer": {"tokenizer_type": "Llama2Tokenizer"}}, "carries its tokenizer, .*Give --tokenizer-type"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, changes, said, job):
    write_megatron(toy(), tmp_path / "in")
    with pytest.raises((ConfigError, CheckpointError), match=said):
        quietly(job(tmp_path / "in", "megatron", "native", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["native", "megatron"])
def test_what_is_written_wrong_is_found_and_never_there(tmp_path, target, job, monkeypatch):
    """The hash is of what was read; a tensor that changes on its way to the file is another one."""
    write_megatron(toy("norm"), tmp_path / "in")
    read = Watched.read

    def changed(self, name):
        tensor = read(self, name)
        return tensor + 1 if name == "exits.4.norm.bias" else tensor

    monkeypatch.setattr(module.Watched, "read", changed)
    with pytest.raises(CheckpointError, match=r"not what was read, and is removed: exits\.4\.norm\.bias"):
        quietly(job(tmp_path / "in", "megatron", target))
    assert not list((tmp_path / "out").iterdir())
    job_without = replace(job(tmp_path / "in", "megatron", target), verify=False)
    assert quietly(job_without).directory.is_dir()


def test_a_tensor_that_is_left_out_or_too_much_is_found(tmp_path):
    whole, less = toy("norm"), toy("norm")
    del less.tensors["exits.4.norm.bias"]
    for written, read, number in ((less, whole, 1), (whole, less, 2)):
        watched = Watched(read, lambda size: None)
        for name in watched.specs():
            watched.read(name)
        verify = module._Verified(FORMATS["megatron"], watched, False, lambda size: None)
        path = write_megatron(written, tmp_path / str(number))
        with pytest.raises(CheckpointError, match=r"removed: exits\.4\.norm\.bias$"):
            verify(path)


def spoil(directory: Path, how: str) -> None:
    file = next(directory.rglob("mp_rank_01_000/model_optim_rng.pt"), None)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-3000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "missing":
        file.unlink()
    elif how == "mixed":
        other = file.parent.parent / "mp_rank_00"
        other.mkdir()
        (other / "model_optim_rng.pt").write_bytes(file.read_bytes())
    elif how == "another rank's":
        file.write_bytes((file.parent.parent / "mp_rank_00_001/model_optim_rng.pt").read_bytes())
    elif how == "another save's":
        state = torch.load(file, weights_only=False)
        torch.save(state | {"iteration": 6}, file)
    else:
        assert how == "another model's"
        write_megatron(toy("mlp"), directory.parent / "other", 2, 2)
        file.write_bytes(next((directory.parent / "other").rglob("mp_rank_01_000/*.pt")).read_bytes())


@pytest.mark.parametrize("target", ["native", "megatron"])
@pytest.mark.parametrize(
    "how", ["truncated", "empty", "missing", "mixed", "another rank's", "another model's", "another save's"]
)
def test_broken_files_are_one_error_and_nothing_is_written(tmp_path, how, target, job):
    directory = write_megatron(toy("norm"), tmp_path / "in", 2, 2)
    spoil(directory, how)
    with pytest.raises(CheckpointError) as error:
        quietly(job(tmp_path / "in", "megatron", target, layout=Layout(1, 1)))
    assert "iter_0000007" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["missing", "unknown", "of another shape"])
def test_a_config_that_describes_another_model_is_refused(tmp_path, kind, job):
    source = toy("norm")
    if kind == "missing":
        del source.tensors["layers.2.mlp.up.bias"]
    elif kind == "unknown":
        source.tensors["layers.9.mlp.up.bias"] = torch.ones(3)
    else:
        source.tensors["layers.2.mlp.up.bias"] = torch.ones(3)
    write_native(source, tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"by its own config, does not fit the model[^$]*mlp\.up\.bias"):
        quietly(job(tmp_path / "in", "native", "megatron"))
    assert not (tmp_path / "out").exists()


def test_a_native_checkpoint_that_is_damaged_is_refused(tmp_path, job):
    directory = write_native(toy(), tmp_path / "in")
    file = next((directory / "tensors").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.distcp"):
        quietly(job(tmp_path / "in", "native", "megatron"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["native", "megatron"])
def test_a_wrong_iteration_says_which_are_there(tmp_path, source, job):
    {"native": write_native, "megatron": write_megatron}[source](toy(), tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"iter_0000009 holds no complete checkpoint. Iterations there: 7"):
        quietly(job(tmp_path / "in", source, "megatron", iteration=9))


def test_a_format_that_is_not_what_lies_there_is_said(tmp_path, job):
    write_native(toy(), tmp_path / "in")
    with pytest.raises(CheckpointError, match="native format, not megatron: give --from native"):
        quietly(job(tmp_path / "in", "megatron", "native"))


class Counting(Memory):
    """Gives tensors of its own each time, and keeps the largest sum of bytes that were alive together."""

    def __init__(self, source: Memory) -> None:
        super().__init__(source.config, source.tensors)
        self.alive, self.most, self.lock = 0, 0, Lock()

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name).clone()
        with self.lock:
            self.alive += tensor.nbytes
            self.most = max(self.most, self.alive)
        finalize(tensor, self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size: int) -> None:
        with self.lock:
            self.alive -= size


@pytest.mark.parametrize(("write", "together"), [(write_megatron, 2), (write_native, 4)])
def test_few_tensors_are_in_memory_at_a_time(tmp_path, write, together):
    """Two of Megatron's, where a gate is stacked on its up; of a native one's as many as files are written at once."""
    source = Counting(toy("all", "llama", num_layers=12))
    sizes = sorted((tensor.nbytes for tensor in source.tensors.values()), reverse=True)
    write(source, tmp_path)
    assert 0 < source.most <= sum(sizes[:together]) < sum(sizes) / 8


@pytest.mark.parametrize("target", ["native", "megatron"])
def test_nothing_is_replaced(tmp_path, target, job):
    write_megatron(toy(), tmp_path / "in")
    (tmp_path / "out/iter_0000007").mkdir(parents=True)
    (tmp_path / "out/iter_0000007/kept").write_text("mine")
    with pytest.raises(StorageError, match="iter_0000007 exists and is not replaced"):
        quietly(job(tmp_path / "in", "megatron", target, tokenizer=NULL))
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["iter_0000007", "kept"]
