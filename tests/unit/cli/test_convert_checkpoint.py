"""The converters' command lines: what they ask for, what they say, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.convert.base import Layout
from megatron.checkpoint.convert.exits import NewExits
from megatron.checkpoint.find import recognise
from megatron.checkpoint.stored_run import stored_config
from megatron.cli import convert_checkpoint, reshard_checkpoint
from tests.unit.checkpoint.convert.conftest import assert_equal, read_model, toy, write_megatron, write_native

ROOT = Path(__file__).resolve().parents[3]
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "59"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A checkpoint of a Llama in Megatron's format, tp=2 pp=2, with exits behind layers 2 and 4."""
    write_megatron(toy("untied", "llama"), tmp_path / "in", 2, 2)
    return tmp_path / "in"


def convert(load: Path, *words: str, tool=convert_checkpoint) -> int:
    return tool.main(["--load-dir", str(load), "--save-dir", str(load.parent / "out"), *words])


def job(load: Path, *words: str, tool=convert_checkpoint):
    return tool._job(tool.parser().parse_args(["--load-dir", str(load), "--save-dir", "out", *words]))


def test_the_originals_flags_alone_stay_in_the_format(files, capsys):
    flags = ["--load-iteration", "7", "--megatron-path", "somewhere", "--conversion-type", "add-exit"]
    assert convert(files, *flags, "--add-exit-layer-nums", "1", "3") == 0
    assert capsys.readouterr().out == (
        f"wrote {files.parent}/out/iter_0000007 (megatron to megatron): 35 tensors of the model, 0.2 MB, read back "
        "and equal\n"
    )
    found = recognise(files.parent / "out")
    assert found.format == "megatron"
    assert len(list(found.directory.glob("mp_rank_*"))) == 4
    exits = stored_config(found).exits
    assert (exits.exit_layer_nums, exits.untie_exit_output_weights) == ((1, 2, 3, 4), True)


def test_what_the_flags_ask_for(files):
    flags = ["--add-exit-layer-nums", "3", "1", "--use-exit-norm", "--use-exit-mlp", "--use-exit-block",
             "--random-init", "--init-method-std", "0.5", "--seed", "3", "--tie-exit-output-weights",
             "--target-exit-position", "post", "--target-tensor-parallel-size", "4", "--no-verify"]  # fmt: skip
    asked = job(files, *flags)
    assert asked.add == NewExits((3, 1), "own", True, True, "post", True, True, 0.5, 3)
    assert (asked.source, asked.target, asked.layout, asked.verify) == ("megatron", "megatron", Layout(4), False)
    moved = job(files, "--conversion-type", "exit-position")
    assert (moved.move, moved.add, moved.verify) == ("post", None, True)
    declared = job(files, "--to", "native", "--exits-at", "1", "2", *NULL)
    assert (declared.declare, declared.target) == ((1, 2), "native")
    assert declared.tokenizer == {"tokenizer_type": "NullTokenizer", "vocab_size": 59}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to convert: give --add-exit-layer-nums"),
        (["--use-exit-norm"], "--use-exit-norm: there is no exit to apply to"),
        (["--exits-at", "1", "--add-exit-layer-nums", "3"], "--exits-at declares"),
        (["--conversion-type", "exit-position", "--exits-at", "1"], "moves the exits there are"),
        (["--conversion-type", "exit-position"], "in position post already"),
        (["--conversion-type", "exit-position", "--target-exit-position", "pre"], "exit 4 can't move"),
        (["--load-iteration", "-1", "--to", "native"], "--load-iteration must not be negative"),
        (["--target-tensor-parallel-size", "0"], "--target-tensor-parallel-size must be at least 1"),
        (["--target-pipeline-parallel-size", "3"], "pp=3 does not divide --num-layers 4"),
        (["--add-exit-layer-nums", "9"], "9 lies beyond the model's depth"),
        (["--add-exit-layer-nums", "2"], "exits 2 are there already"),
    ],
)
def test_what_makes_no_sense_ends_with_2(files, words, said, capsys):
    assert convert(files, *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err
    assert not (files.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--to", "native", "--load-iteration", "8"], 4, "holds no complete checkpoint. Iterations there: 7"),
        (["--from", "native", "--to", "megatron"], 4, "give --from megatron"),
    ],
)
def test_a_checkpoint_that_is_not_there_ends_with_4(files, words, code, said, capsys):
    assert convert(files, *words) == code
    assert said in capsys.readouterr().err


def test_a_directory_without_any_ends_with_4(tmp_path, capsys):
    assert convert(tmp_path / "nowhere", "--to", "native") == 4
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_place_that_is_taken_ends_with_5(files, capsys):
    assert convert_checkpoint.main(
        ["--load-dir", str(files), "--save-dir", str(files), "--add-exit-layer-nums", "1"]
    ) == 5  # fmt: skip
    assert "exists and is not replaced" in capsys.readouterr().err


def test_a_native_checkpoint_needs_no_converting(tmp_path, capsys):
    write_native(toy(), tmp_path / "in")
    assert convert(tmp_path / "in") == 2
    assert "runs of any layout read a native checkpoint as it is" in capsys.readouterr().err


def test_the_resharder_changes_the_layout(files, capsys):
    flags = ["--model-type", "EarlyExitGPT", "--loader", "megatron", "--saver", "megatron", "--max-queue-size", "9"]
    flags += ["--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "4"]
    assert convert(files, *flags, tool=reshard_checkpoint) == 0
    found = recognise(files.parent / "out")
    assert sorted(path.name for path in found.directory.glob("mp_rank_*")) == [f"mp_rank_00_{p:03d}" for p in range(4)]
    assert_equal(read_model(files.parent / "out"), read_model(files))


def test_the_resharder_moves_exits_where_asked(tmp_path):
    write_megatron(toy("tied"), tmp_path / "in")
    flags = ["--model-type", "GPT", "--target-exit-position"]
    assert convert(tmp_path / "in", *flags, "pre", "--no-checking", tool=reshard_checkpoint) == 0
    exits = stored_config(recognise(tmp_path / "out")).exits
    assert (exits.exit_layer_nums, exits.pre_exit) == ((2, 4), True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model-type", "BERT"], "GPT models only"),
        (["--model-type", "GPT", "--loader", "llama2_hf"], "needs --tokenizer-model"),
        (["--model-type", "GPT", "--vocab-file", "vocab.json", "--true-vocab-size", "4"], "vocab.json has 3 words"),
        (["--model-type", "GPT", "--vocab-file", "list.json"], "holds a list, not words"),
        (["--model-type", "GPT", "--vocab-file", "none.json"], "cannot read it"),
    ],
)
def test_what_the_resharder_refuses(files, words, said, capsys, monkeypatch):
    monkeypatch.chdir(files.parent)
    Path("vocab.json").write_text('{"a": 0, "b": 1, "c": 2}')
    Path("list.json").write_text("[]")
    assert convert(files, *words, tool=reshard_checkpoint) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_vocabulary_in_a_file_says_how_many_ids_there_are(files, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "c": 2}')
    words = ["--model-type", "GPT", "--vocab-file", str(tmp_path / "vocab.json")]
    assert job(files, *words, tool=reshard_checkpoint).vocab_size == 3


def test_the_script_passes_its_variables_on(files):
    environment = os.environ | {
        "LOAD_DIR": str(files), "SAVE_DIR": str(files.parent / "out"), "TP": "2", "PP": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    words = ["bash", str(ROOT / "tools" / "convert_parallelism.sh"), "--no-checking"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=files.parent)
    assert done.returncode == 0, done.stderr
    assert "not read back" in done.stdout
    names = sorted(path.name for path in recognise(files.parent / "out").directory.glob("mp_rank_*"))
    assert names == ["mp_rank_00", "mp_rank_01"]
