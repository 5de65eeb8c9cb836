"""`load`: flags, config file and base together, with all faults in one error."""

import json
from pathlib import Path

import pytest

from megatron.config.fields import build
from megatron.config.load import load
from megatron.config.model import ExitConfig
from megatron.config.run import RunConfig
from megatron.errors import ConfigError

SIZES = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"]


def write(path: Path, data: object) -> str:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_what_was_given_is_known() -> None:
    loaded = load([*SIZES, "--use-exit-norm", "--exit-layer-nums", "2", "--use-flash-attn"])
    assert loaded.given == {*("num_layers", "hidden_size", "num_attention_heads", "seq_length")} | {
        "exit_norm",
        "exit_layer_nums",
    }
    assert loaded.config.exits.exit_norm == "own"
    assert loaded.notes == ("accepted without effect: --use-flash-attn",)


def test_accepted_flags_are_said_in_one_line() -> None:
    flags = ["--use-flash-attn", "--no-masked-softmax-fusion", "--use-flash-attn", "--sequence-parallel"]
    notes = load([*SIZES, *flags]).notes
    assert notes[0] == "accepted without effect: --use-flash-attn, --no-masked-softmax-fusion"
    assert notes[1].startswith("without effect with one tensor-parallel rank")


def test_data_are_not_needed_to_parse() -> None:
    assert load(SIZES).config.data.data_path == ()


def test_no_file_is_touched() -> None:
    paths = ["--data-path", "/nowhere/a", "--save", "/nowhere/b", "--load", "/nowhere/c", "--vocab-file", "/no/d"]
    assert load([*SIZES, *paths]).config.checkpoint.load == "/nowhere/c"


def test_faults_of_flags_and_rules_come_together() -> None:
    with pytest.raises(ConfigError) as error:
        load([*SIZES, "--fill-explicit-bubbles", "--pipeline-model-parallel-size", "3", "--lr", "x"])
    message = str(error.value)
    assert message.startswith("3 settings need mending:")
    assert "--pipeline-model-parallel-size 3 does not divide" in message


def test_absurd_numbers_are_faults_not_crashes() -> None:
    sizes = [*SIZES[:2], "--hidden-size", "4" * 400, *SIZES[4:], "--swiglu", "--seed", "-" + "9" * 400]
    shares = "--lr-warmup-fraction 1e308 --rotary-percent 1e308 --position-embedding-type rope"
    with pytest.raises(ConfigError) as error:
        load([*sizes, *shares.split(), "--train-iters", "5", "--lr", "1"])
    for flag in ("--seed", "--lr-warmup-fraction", "--rotary-percent"):
        assert flag in str(error.value)


def test_help_takes_no_value() -> None:
    with pytest.raises(ConfigError, match="--help"):
        load(["--help=me"])


def test_a_value_that_was_not_read_is_not_called_missing() -> None:
    with pytest.raises(ConfigError) as error:
        load(["--num-layers", "x", "--hiden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"])
    assert "missing" not in str(error.value)


def test_checkpoint_args_let_sizes_wait() -> None:
    loaded = load(["--use-checkpoint-args", "--load", "d", "--exit-layer-weight", "1"])
    assert loaded.config.model.num_layers is None


def test_base_supplies_the_rest() -> None:
    base = build({"num_layers": 2, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 4}, RunConfig())
    loaded = load(["--bf16"], base=base)
    assert loaded.given == {"bf16"}
    assert loaded.config.model == base.model


def test_other_exits_drop_the_lists_of_the_base() -> None:
    values = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 4, "exit_layer_nums": (1, 3)}
    values |= {"exit_layer_weight": (0.1, 0.2), "exit_layer_temperature": (2.0, 2.0)}
    base = build(values, RunConfig())
    loaded = load(["--exit-layer-nums", "2", "--exit-layer-weight", "0.5"], base=base)
    assert loaded.config.exits == ExitConfig(exit_layer_nums=(2,), exit_layer_weight=(0.5,))
    assert loaded.given == {"exit_layer_nums", "exit_layer_weight"}
    assert loaded.notes == ("left out, as --exit-layer-nums names other exits than before: exit_layer_temperature",)
    same = load(["--exit-layer-nums", "1", "3"], base=base)
    assert (same.config, same.notes) == (base, ())


@pytest.mark.parametrize("name", ["c.yaml", "c.json", "c.yml"])
def test_config_file_flat(tmp_path: Path, name: str) -> None:
    data = {"num_layers": 4, "hidden-size": 32, "--num-attention-heads": 4, "seq_length": 16}
    data |= {"optimizer": "sgd", "use_exit_norm": True, "exit_layer_nums": [2], "no-save-optim": True}
    data |= {"layernorm-epsilon": 1e-3, "use_rotary_position_embeddings": False, "recompute_activations": None}
    data |= {"swiglu": False, "use_flash_attn": True, "num_experts": None, "fp8_margin": False, "vocab_size": None}
    loaded = load(["--config", write(tmp_path / name, data)])
    assert loaded.config.optimizer.optimizer == "sgd"
    assert loaded.config.exits.exit_norm == "own"
    assert not loaded.config.checkpoint.save_optim
    assert loaded.config.model.norm_epsilon == 1e-3
    assert loaded.config.model.position_embedding_type == "learned_absolute"
    assert "vocab_size" not in loaded.given
    assert loaded.notes == ("accepted without effect: --use-flash-attn",)


def test_config_file_in_sections(tmp_path: Path) -> None:
    text = """
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, seq_length: 16}
optimizer:
  optimizer: sgd
learning_rate:
  lr: 1e-3   # YAML reads this as text
"""
    config = load(["--config", write(tmp_path / "c.yaml", text)]).config
    assert (config.optimizer.optimizer, config.learning_rate.lr) == ("sgd", 1e-3)


def test_aliases_of_a_config_file(tmp_path: Path) -> None:
    """As people use them; what could fill the memory with a few lines is refused (checkpoint/hostile)."""
    text = "optimizer: &common {weight_decay: 0.5}\nlr: &rate 1.0e-3\nmin_lr: *rate\nlogging: {<<: *common}\n"
    config = load([*SIZES, "--config", write(tmp_path / "c.yaml", text)]).config
    assert (config.learning_rate.min_lr, config.optimizer.weight_decay) == (1e-3, 0.5)


def test_flags_overrule_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", {"lr": 1.0, "swiglu": True, "exit_norm": "own", "save_optim": False})
    flags = ["--lr", "2", "--no-swiglu", "--exit-norm", "none", "--save-optim"]
    config = load([*SIZES, "--config", path, *flags]).config
    assert config.learning_rate.lr == 2
    assert (config.model.swiglu, config.exits.exit_norm, config.checkpoint.save_optim) == (False, "none", True)


def test_faults_of_a_file_name_file_and_key(tmp_path: Path) -> None:
    data = {"hiden_size": 1, "lr": [1], "num_experts": 4, "use_exit_norm": "yes", "swiglu": 1, "seed": None}
    path = write(tmp_path / "c.json", {**data, "local_rank": [0, 1], "transformer_impl": "local"})
    with pytest.raises(ConfigError) as error:
        load([*SIZES, "--config", path])
    lines = str(error.value).splitlines()
    assert lines[0] == "7 settings need mending:"
    assert f"  {path}: hiden_size: unknown; did you mean hidden_size?" in lines
    assert all(line.startswith(f"  {path}: ") for line in lines[1:])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.json", "{", "is not valid JSON"),
        ("c.yaml", "a: [", "is not valid YAML"),
        ("c.yaml", "- a", "expected keys and values, found list"),
        ("c.json", "3", "expected keys and values, found int"),
        ("c.json", '{"seed": ' + "[" * 90_000, "is nested too deeply"),
        ("c.yaml", "seed: " + "[" * 2_000, "is nested too deeply"),
        ("c.yaml", "save: 2024-13-45", "is not valid YAML: month"),
        ("c.yaml", "config: other.yaml", "config: can't stand in a file; give --config on the command line"),
        ("c.json", '{"help": true}', "help: can't stand in a file; give --help"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(["--config", write(tmp_path / name, text)])


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"--config nowhere.yaml: No such file"):
        load(["--config", "nowhere.yaml"])


def test_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    assert load([*SIZES, "--config", write(tmp_path / "c.yaml", "")]).config == load(SIZES).config


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(["--config", str(tmp_path / "c.yaml")])
