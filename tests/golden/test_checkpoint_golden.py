"""Checkpoints recorded from the original read back: every file, every layout, moments under the right names."""

import json
import re
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import megatron_legacy, native
from megatron.checkpoint.find import recognise
from megatron.checkpoint.safe import read_legacy
from megatron.checkpoint.state import RunState

LAYOUT = re.compile(r"tp\d+pp\d+")
VOCAB = 505  # ids of the recorded SentencePiece tokenizer; its rows are padded to 512


def read(root: Path) -> RunState:
    return megatron_legacy.read(recognise(root).directory, vocab_size=VOCAB)


def case(golden_dir: Path, *path: str) -> Path:
    root = golden_dir.joinpath(*path)
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    return root


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing


def test_every_file_is_read(golden_dir):
    files = sorted(golden_dir.rglob("model_optim_rng.pt"))
    assert files
    for file in files:
        state = read_legacy(file)
        assert state["model"]
        assert vars(state["args"])["num_layers"] > 0


def checkpoints(golden_dir: Path) -> list[Path]:
    return sorted({file.parent.parent for file in golden_dir.rglob("model_optim_rng.pt")})


def test_every_checkpoint_is_read_without_complaint(golden_dir, caplog):
    for directory in checkpoints(golden_dir):
        facts = megatron_legacy.read(directory).facts
        assert facts["iteration"] == recognise(directory).iteration
        json.dumps(facts, allow_nan=False)
    assert not caplog.records


def test_layouts_of_one_model_are_equal(golden_dir):
    families: dict[Path, list[Path]] = {}
    for directory in checkpoints(golden_dir):
        if LAYOUT.fullmatch(directory.parent.name):
            families.setdefault(directory.parent.parent, []).append(directory)
    assert sum(len(family) for family in families.values()) >= 2
    for first, *others in families.values():
        expected = megatron_legacy.read(first).tensors
        for other in others:
            assert_equal(megatron_legacy.read(other).tensors, expected)


def test_moments_belong_to_parameters(golden_dir):
    states = [megatron_legacy.read(directory) for directory in checkpoints(golden_dir)]
    states = [state for state in states if any(name.startswith("optimizer/") for name in state.tensors)]
    assert states
    for state in states:
        facts, args = state.facts, state.facts["args"]
        shapes = {name.removeprefix("model/"): t.shape for name, t in state.tensors.items() if name[:6] == "model/"}
        for kind in ("exp_avg", "exp_avg_sq"):
            prefix = f"optimizer/{kind}/"
            moments = {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
            assert moments.keys() == shapes.keys()
            assert all(moment.shape == shapes[name] for name, moment in moments.items())
            assert kind == "exp_avg" or all((moment >= 0).all() for moment in moments.values())
        assert facts["optimizer_step"] == facts["iteration"]
        assert facts["consumed_train_samples"] == args["global_batch_size"] * facts["iteration"]
        assert facts["opt_param_scheduler"]["num_steps"] == facts["consumed_train_samples"]


def test_gated_projections_are_apart(golden_dir):
    tensors = read(case(golden_dir, "C_base_llama") / "tp1pp2").tensors
    for part in ("gate", "up"):
        assert tensors[f"model/layers.7.mlp.{part}.weight"].shape == (64, 32)


def test_a_merged_layout_equals_the_originals_own_merge(golden_dir):
    source = read(case(golden_dir, "E_gpt_src_tp2pp2", "ckpt")).tensors
    merged = read(case(golden_dir, "E_gpt_conv_tp1pp1", "ckpt")).tensors
    assert_equal({key: t for key, t in source.items() if key.startswith("model/")}, merged)


def test_converted_exits_are_copies_of_the_end(golden_dir):
    tensors = read(case(golden_dir, "C_llama_mlp")).tensors
    for exit_ in (2, 4, 8):
        assert torch.equal(tensors[f"model/exits.{exit_}.output.weight"], tensors["model/output.weight"])
        assert torch.equal(tensors[f"model/exits.{exit_}.norm.weight"], tensors["model/final_norm.weight"])
        for part in ("gate", "up", "down"):
            branch = tensors[f"model/exits.{exit_}.branch.{part}.weight"]
            assert torch.equal(branch, tensors[f"model/layers.{exit_ - 1}.mlp.{part}.weight"])


def test_tuning_left_the_backbone_alone(golden_dir):
    before = read(case(golden_dir, "C_llama_mlp")).tensors
    after = read(case(golden_dir, "C_tune_llama_mlp", "ckpt")).tensors
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model/exits.") for name in changed)


def test_names_are_those_of_the_recorded_gradients(golden_dir):
    """Every recorded parameter has its tensor, of the same size, and none is left over."""
    for name in ("A_2_llama", "A_3_exit_mlp", "A_4_exit_block"):
        root = case(golden_dir, name)
        recorded = json.loads((root / "case.json").read_text())["params"]
        tensors = megatron_legacy.read(recognise(root / "ckpt").directory).tensors
        assert sum(t.numel() for t in tensors.values()) == sum(torch.Size(s).numel() for s in recorded.values())


def test_a_recorded_checkpoint_makes_the_native_round_trip(golden_dir, tmp_path):
    state = read(case(golden_dir, "B_gpt_save10", "ckpt"))
    directory = native.save(tmp_path, state.facts["iteration"], state)
    assert_equal(native.read(directory).tensors, state.tensors)
