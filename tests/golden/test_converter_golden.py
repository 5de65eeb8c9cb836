"""Conversions that the original's tools were recorded doing, by the same command lines: every tensor the same."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.find import recognise
from megatron.checkpoint.safe import read_legacy
from megatron.cli import convert_checkpoint, reshard_checkpoint
from tests.golden.argv import redirect
from tests.golden.conftest import read_case
from tests.golden.test_trajectory_golden import RELATIVE, recorded_rows, run_training

TOOLS = {
    "tools/checkpoint/checkpoint_converter.py": convert_checkpoint.main,
    "tools/checkpoint/util.py": reshard_checkpoint.main,
}
# What the original's saver changes though it says nothing of the model: what the run that saved was told.
_OF_THE_SAVER = {"rank", "local_rank", "model_type"}


def flat(part: dict[str, Any], above: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in part.items():
        found |= flat(value, f"{above}{key}/") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("model_optim_rng.pt"))


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The same files with the same names, tensors, types, iteration and version; and the same tracker."""
    assert files(ours) == files(theirs) != []
    for file in files(theirs):
        found, expected = read_legacy(ours / file), read_legacy(theirs / file)
        mine, recorded = flat(found["model"]), flat(expected["model"])
        assert mine.keys() == recorded.keys()
        wrong = [n for n, t in recorded.items() if mine[n].dtype != t.dtype or not torch.equal(mine[n], t)]
        assert not wrong
        for key in ("iteration", "checkpoint_version"):
            assert found[key] == expected[key]
    assert recognise(ours).iteration == recognise(theirs).iteration
    assert (ours / "latest_checkpointed_iteration.txt").exists()


def conversions(golden_dir: Path) -> list[Path]:
    found = sorted(path.parent for path in golden_dir.glob("*/convert.json"))
    if not found:
        pytest.skip(f"no recorded conversions in {golden_dir}")
    return found


def test_every_recorded_conversion(golden_dir: Path, tmp_path: Path) -> None:
    for case in conversions(golden_dir):
        recorded = json.loads((case / "convert.json").read_text())
        argv = ["--load-dir", str(golden_dir / recorded["load_dir"]), "--save-dir", str(tmp_path / case.name)]
        argv += ["--load-iteration", str(recorded["load_iteration"]), *shlex.split(recorded["args"])]
        assert TOOLS[recorded["tool"]](argv) == recorded["rc"]
        assert_same_files(tmp_path / case.name, case)
        (file,) = files(case)
        mine, theirs = (vars(read_legacy(root / file)["args"]) for root in (tmp_path / case.name, case))
        assert mine == {name: value for name, value in theirs.items() if name not in _OF_THE_SAVER}


def test_layouts_there_and_back(golden_dir: Path, tmp_path: Path) -> None:
    """As the original changed the layout, and then back to what it was."""
    case = golden_dir / "E_gpt_conv_tp1pp1"
    if not case.is_dir():
        pytest.skip(f"no {case.name} in {golden_dir}")
    tool, *words = shlex.split(read_case(case)["how"])
    words = [str(golden_dir / word) if word.endswith("/ckpt") else word for word in words]
    assert TOOLS[tool]([*words, "--save-dir", str(tmp_path / "one")]) == 0
    assert_same_files(tmp_path / "one", case / "ckpt")
    argv = ["--model-type", "EarlyExitGPT", "--load-dir", str(tmp_path / "one"), "--save-dir", str(tmp_path / "four")]
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    assert reshard_checkpoint.main(argv + sizes) == 0
    assert_same_files(tmp_path / "four", golden_dir / "E_gpt_src_tp2pp2" / "ckpt")


def test_exits_and_their_layout_in_one_go(golden_dir: Path, tmp_path: Path) -> None:
    """The recorded base in two layouts: exits added to either, in the other's layout, are the same files."""
    base = golden_dir / "C_base_llama"
    if not base.is_dir():
        pytest.skip(f"no {base.name} in {golden_dir}")
    flags = ["--add-exit-layer-nums", "2", "4", "8", "--use-exit-norm", "--use-exit-mlp", "--use-exit-block"]
    for source in ("tp1pp1", "tp1pp2"):
        for pp in ("1", "2"):
            argv = ["--load-dir", str(base / source), "--save-dir", str(tmp_path / f"{source} to pp{pp}"), *flags]
            assert convert_checkpoint.main([*argv, "--target-pipeline-parallel-size", pp]) == 0
    for pp in ("1", "2"):
        assert_same_files(tmp_path / f"tp1pp1 to pp{pp}", tmp_path / f"tp1pp2 to pp{pp}")


def test_a_run_goes_on_from_the_converted_checkpoint(golden_dir: Path, tmp_path: Path) -> None:
    """The recorded continuation of a run, from its checkpoint in our format: optimizer, schedules and data go on."""
    case, start = golden_dir / "B_gpt_resume10", golden_dir / "B_gpt_save10" / "ckpt"
    if not (case.is_dir() and start.is_dir()):
        pytest.skip(f"no {case.name} in {golden_dir}")
    argv = redirect(read_case(case)["argv"], golden_dir, tmp_path)
    words = ["--tokenizer-model", argv[argv.index("--tokenizer-model") + 1]]
    native = tmp_path / "native"
    assert convert_checkpoint.main(["--load-dir", str(start), "--save-dir", str(native), "--to", "native", *words]) == 0
    argv[argv.index("--load") + 1] = str(native)
    expected = recorded_rows(case)
    ours = run_training(argv, 1, tmp_path)
    assert [line["iteration"] for line in ours] == sorted(expected)
    for line in ours:
        theirs = expected[line["iteration"]]
        assert line["loss/final"] == pytest.approx(theirs["loss"]["lm loss"], rel=RELATIVE)
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=RELATIVE)
    shutil.rmtree(native)
