"""Stored configs: round trips, older and damaged ones, and what a checkpoint says about its model."""

import json
import logging
from pathlib import Path

import pytest

from megatron.config.fields import build, by_name
from megatron.config.load import (
    from_checkpoint,
    from_dict,
    load,
    merge_checkpoint_args,
    save_config,
    to_dict,
)
from megatron.config.run import RunConfig
from megatron.config.stored import FILLED, FORCED
from megatron.errors import ConfigError, StorageError

SHAPE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
# As a Megatron checkpoint holds them: derived values filled in, much that is no concern of ours.
LEGACY = {
    **SHAPE,
    "ffn_hidden_size": 128,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": True,
    "add_position_embedding": False,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "exit_layer_nums": [2],
    "exit_layer_weight": [0.5],
    "exit_layer_temperature": [1.0],
    "use_exit_norm": True,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "start_weight_decay": 0.01,
    "params_dtype": "torch.float32",
    "model_type": "ModelType.encoder_or_decoder",
    "padded_vocab_size": 512,
    "data_path": None,
    "rampup_batch_size": None,
    "no_save_optim": True,
    "vision_backbone_type": "vit",
}


def config_of(settings: dict) -> RunConfig:
    return build({**SHAPE, **settings}, RunConfig())


def test_older_configs_take_defaults() -> None:
    config = from_dict({"model": {"num_layers": 2}})
    assert config == build({"num_layers": 2}, RunConfig())
    assert from_dict({}) == RunConfig()


def test_unknown_and_wrong_keys_are_named() -> None:
    data = {"model": {"num_layer": 2, "hidden_size": "x", "lr": 1}, "modle": {}, "data": 3}
    with pytest.raises(ConfigError) as error:
        from_dict(data, "ckpt/config.json")
    message = str(error.value)
    assert message.startswith("ckpt/config.json: 5 settings need mending:")
    assert "model.num_layer: unknown; did you mean num_layers?" in message
    assert "model.hidden_size: 'x' is not a whole number" in message
    assert "modle: unknown; did you mean model?" in message


def test_saved_json_and_yaml_are_read_back(tmp_path: Path) -> None:
    config = config_of({"exit_layer_nums": (2, 4), "lr": 1e-5})
    for name in ("a.json", "a.yaml"):
        save_config(tmp_path / name, config)
        assert load(["--config", str(tmp_path / name)]).config == config
    assert from_dict(json.loads((tmp_path / "a.json").read_text())) == config


def test_saving_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    save_config(path, config_of({}))
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: cannot write the configuration: No space left"):
        save_config(path, config_of({"lr": 1.0}))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_config(tmp_path / "file" / "a.json", config_of({}))


def test_native_checkpoint_gives_its_config() -> None:
    config = config_of({"lr": 1e-3, "bf16": True, "log_interval": 3})
    assert from_checkpoint(to_dict(config)) == config


def test_legacy_checkpoint_gives_its_model() -> None:
    config = from_checkpoint(LEGACY)
    assert config.model.position_embedding_type == "rope"
    assert config.model.norm_epsilon == 1e-6
    assert config.exits.exit_norm == "own"
    assert config.exits.exit_layer_weight == (0.5,)
    assert config.parallel == RunConfig().parallel
    assert config.optimizer == RunConfig().optimizer
    assert config.checkpoint == RunConfig().checkpoint


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ({}, "learned_absolute"),
        ({"add_position_embedding": True}, "learned_absolute"),
        ({"add_position_embedding": False}, "none"),
        ({"position_embedding_type": "rope"}, "rope"),
        ({"use_rotary_position_embeddings": True, "position_embedding_type": "learned_absolute"}, "rope"),
    ],
)
def test_legacy_positions(args: dict, kind: str) -> None:
    assert from_checkpoint({**SHAPE, **args}).model.position_embedding_type == kind


def test_legacy_names_of_older_versions() -> None:
    assert from_checkpoint({**SHAPE, "layernorm_epsilon": 1e-3}).model.norm_epsilon == 1e-3


def test_stale_lists_of_converted_checkpoints_are_dropped() -> None:
    config = from_checkpoint({**LEGACY, "exit_layer_nums": [2, 4]})
    assert (config.exits.exit_layer_nums, config.exits.exit_layer_weight) == ((2, 4), ())


def test_bad_legacy_arguments_name_their_source() -> None:
    with pytest.raises(ConfigError, match="ckpt: num_layers: 'x' is not a whole number"):
        from_checkpoint({**LEGACY, "num_layers": "x"}, "ckpt")
    with pytest.raises(ConfigError, match="ckpt: --exit-layer-nums 9 lies beyond"):
        from_checkpoint({**LEGACY, "exit_layer_nums": [9]}, "ckpt")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron")
    return caplog


def merge(line: str, stored: dict) -> RunConfig:
    loaded = load(["--use-checkpoint-args", "--load", "d", *line.split()])
    return merge_checkpoint_args(loaded.config, loaded.given, stored, "d")


@pytest.mark.parametrize("stored", [LEGACY, to_dict(from_checkpoint(LEGACY))], ids=["legacy", "native"])
def test_merge_takes_the_shape(stored: dict, log: pytest.LogCaptureFixture) -> None:
    config = merge("--lr 1e-3 --train-iters 5 --data-path a", stored)
    assert config.model.num_layers == 4
    assert config.model.normalization == "RMSNorm"
    assert config.exits.exit_layer_nums == (2,)
    assert config.exits.exit_norm == "own"
    assert config.learning_rate.lr == 1e-3
    assert config.data.data_path == ("a",)
    assert config.parallel.tensor_model_parallel_size == 1
    assert len(log.messages) == 1
    assert "--use-checkpoint-args, from d:" in log.messages[0]
    assert "exit_layer_nums 2" in log.messages[0]


def test_merge_says_who_won(log: pytest.LogCaptureFixture) -> None:
    config = merge("--seq-length 8 --normalization LayerNorm --exit-norm final --exit-layer-nums 3", LEGACY)
    assert config.model.seq_length == 8
    assert config.model.normalization == "RMSNorm"
    (line,) = log.messages
    assert "seq_length stays 8 as given" in line
    assert "normalization RMSNorm overrules the given LayerNorm" in line
    assert "exit_norm own overrules the given final" in line
    assert "exit_layer_nums 2 overrules the given 3" in line


def test_merge_without_change_says_so(log: pytest.LogCaptureFixture) -> None:
    config = config_of({"use_checkpoint_args": True, "load": "d"})
    assert merge_checkpoint_args(config, set(SHAPE), to_dict(config), "d") == config
    assert log.messages == ["--use-checkpoint-args, from d: no change"]


def test_merge_keeps_given_weights_where_the_checkpoint_has_none() -> None:
    stored = {**LEGACY, "exit_layer_nums": [2, 4], "exit_layer_weight": []}
    assert merge("--exit-layer-weight 0.1 0.2", stored).exits.exit_layer_weight == (0.1, 0.2)


def test_merge_leaves_alone_what_the_checkpoint_lacks() -> None:
    config = merge("--exit-layer-nums 1 --exit-norm own", SHAPE)
    assert (config.exits.exit_layer_nums, config.exits.exit_norm) == ((1,), "own")


def test_merge_checks_the_outcome() -> None:
    with pytest.raises(ConfigError, match=r"with --use-checkpoint-args from d: --seq-length 99 is longer"):
        merge("--seq-length 99", LEGACY)


def test_merge_lists_are_fields() -> None:
    assert {*FORCED, *FILLED} <= set(by_name())
    assert not {*FORCED} & {*FILLED}
    assert {by_name()[name].section for name in (*FORCED, *FILLED)} == {"model", "exits", "tokenizer"}
