"""Recorded command lines of EE-LLM: each is a valid config."""

import json
from pathlib import Path

import pytest

from megatron.config.fields import all_flags
from megatron.config.load import from_checkpoint, load
from tests.golden.argv import redirect

_GOLDEN = Path(__file__).resolve().parents[3].parent / "shared" / "golden"


def _cases(key: str) -> list:
    found = [
        pytest.param(case[key], id=path.parent.name)
        for path in sorted(_GOLDEN.glob("*/case.json"))
        if (case := json.loads(path.read_text())).get(key)
    ]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=f"no recorded {key} in {_GOLDEN}"))]


@pytest.mark.parametrize("argv", _cases("argv"))
def test_recorded_flags(argv: list[str]) -> None:
    assert load(argv).config.model.num_layers


@pytest.mark.parametrize("stored", _cases("checkpoint_args"))
def test_recorded_checkpoint_arguments(stored: dict) -> None:
    for args in stored.values():
        config = from_checkpoint(args)
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size"):
            assert getattr(config.model, name) == args[name]
        assert list(config.exits.exit_layer_nums) == (args.get("exit_layer_nums") or [])
        assert (config.exits.exit_norm == "own") == bool(args.get("use_exit_norm"))


@pytest.mark.parametrize("args", _cases("args"))
def test_recorded_arguments_make_the_same_model(args: dict) -> None:
    """What EE-LLM parsed from a line, and what we parse from it, describe one model."""
    stored = from_checkpoint(args)
    case = next(path for path in _GOLDEN.glob("*/case.json") if json.loads(path.read_text()).get("args") == args)
    model = load(json.loads(case.read_text())["argv"]).config.model
    for name in ("ffn_size", "head_dim", "num_kv_heads", "activation", "qkv_bias", "max_positions"):
        assert getattr(stored.model, name) == getattr(model, name), name


def test_every_path_of_a_recorded_line_is_redirected(tmp_path: Path) -> None:
    """Nothing is read from, or written to, where the tests happen to run."""
    paths = [flag.flag for flag in all_flags() if flag.metavar in ("DIR", "FILE", "PATH")] + ["--config"]
    blends = [f"--{name}data-path" for name in ("", "train-", "valid-", "test-")]
    argv = [word for flag in paths for word in (flag, "x")]
    argv += [word for flag in blends for word in (flag, "0.5", "x", "1", "y")]
    moved = [word for word in redirect(argv, tmp_path / "in", tmp_path / "out") if not word.startswith("--")]
    assert [word for word in moved if not word.startswith(str(tmp_path))] == ["0.5", "1"] * 4
