from dataclasses import replace

import pytest

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.checkpoint.state import RunState
from megatron.checkpoint.stored_run import stored_args, stored_config
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig
from megatron.config.run import CheckpointConfig, LoggingConfig, RunConfig
from megatron.config.stored import to_dict
from megatron.errors import CheckpointError, ConfigError
from megatron.testing.tiny import model_config

MODEL = model_config("llama")


def save(root, config, files=()):
    native.save(root, 3, RunState({}, {"config": to_dict(config)}), files)
    return recognise(root)


@pytest.fixture
def config():
    return replace(RunConfig(), model=MODEL, exits=ExitConfig(exit_layer_nums=(1, 3)))


@pytest.fixture
def words(tmp_path):
    files = [tmp_path / "words" / name for name in ("vocab.json", "merges.txt")]
    files[0].parent.mkdir()
    for file in files:
        file.write_text(file.name)
    return files


def test_tokenizer_files_are_those_inside_the_checkpoint(tmp_path, config, words):
    flags = TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(words[0]), merge_file=str(words[1]))
    found = save(tmp_path / "run", replace(config, tokenizer=flags), words)
    for file in words:
        file.unlink()
    inside = found.directory / "tokenizer"
    expected = replace(flags, vocab_file=str(inside / "vocab.json"), merge_file=str(inside / "merges.txt"))
    assert stored_config(found).tokenizer == expected


def test_a_tokenizer_directory_becomes_the_one_inside(tmp_path, config, words):
    flags = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(words[0].parent))
    found = save(tmp_path / "run", replace(config, tokenizer=flags), words)
    assert stored_config(found).tokenizer == replace(flags, tokenizer_model=str(found.directory / "tokenizer"))


def test_a_tokenizer_without_files_stays(tmp_path, config):
    flags = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=59)
    assert stored_config(save(tmp_path, replace(config, tokenizer=flags))).tokenizer == flags


def test_a_changed_tokenizer_file_is_refused(tmp_path, config, words):
    found = save(tmp_path / "run", config, words)
    (found.directory / "tokenizer" / "merges.txt").write_text("other")
    with pytest.raises(CheckpointError, match=r"merges\.txt is missing or not the file that was saved"):
        stored_config(found)


def test_what_belongs_to_one_start_is_reset(tmp_path, config):
    stop = replace(config.training, exit_interval=5, exit_duration_in_mins=9, skip_train=True, train_iters=77)
    checkpoint = replace(config.checkpoint, save="there", load="here", finetune=True)
    found = save(tmp_path, replace(config, training=stop, checkpoint=checkpoint))
    read = stored_config(found)
    assert (read.training.exit_interval, read.training.exit_duration_in_mins) == (None, None)
    assert (read.training.skip_train, read.training.train_iters) == (False, 77)
    assert (read.checkpoint, read.logging) == (CheckpointConfig(), LoggingConfig())
    assert (read.model, read.exits) == (config.model, config.exits)


def test_native_args_are_the_nested_config(tmp_path, config):
    assert stored_args(save(tmp_path, config)) == to_dict(config)


@pytest.mark.parametrize(
    ("facts", "message"),
    [({}, "lacks config"), ({"config": [1]}, "config is a list"), ({"config": {}}, "config lacks model")],
)
def test_facts_without_a_config_are_refused(tmp_path, facts, message):
    native.save(tmp_path, 3, RunState({}, facts))
    for read in (stored_args, stored_config):
        with pytest.raises(CheckpointError, match=f"iter_0000003/facts.json.*{message}"):
            read(recognise(tmp_path))


def test_legacy_args_are_flat_and_make_a_config(tmp_path, legacy, recipe):
    args = {
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "seq_length": 6,
        "max_position_embeddings": 6,
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": "gone/vocab.json",
        "exit_interval": 5,
        "save": "there",
    }
    legacy(tmp_path, recipe(exits=(2, 4), args=args))
    found = recognise(tmp_path)
    assert args.items() <= stored_args(found).items()
    config = stored_config(found)
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (4, 8, 4)
    assert config.exits.exit_layer_nums == (2, 4)
    assert config.tokenizer.vocab_file == "gone/vocab.json"
    assert (config.training.exit_interval, config.checkpoint) == (None, CheckpointConfig())


def test_legacy_args_that_make_no_model_are_refused(tmp_path, legacy, recipe):
    legacy(tmp_path, recipe())
    with pytest.raises(ConfigError, match="iter_0000007"):
        stored_config(recognise(tmp_path))
