"""Every field is a flag with a name, a type, help and values that are read without surprises."""

from collections import Counter
from dataclasses import fields

import pytest

from megatron.config.fields import all_flags, build, by_name, from_plain, from_words, opposite, spellings
from megatron.config.run import RunConfig


def test_every_field_is_one_flag() -> None:
    expected = [field.name for section in fields(RunConfig) for field in fields(section.default_factory)]
    assert [flag.name for flag in all_flags()] == expected
    assert max(Counter(expected).values()) == 1, "a name says which section it belongs to"


def test_names_follow_megatron() -> None:
    assert by_name()["num_layers"].flag == "--num-layers"
    assert by_name()["add_bias_linear"].flag == "--disable-bias-linear"
    assert by_name()["save_optim"].flag == "--no-save-optim"
    assert by_name()["override_opt_param_scheduler"].flag == "--override-opt_param-scheduler"


def test_every_flag_has_help() -> None:
    for flag in all_flags():
        assert flag.help.endswith("."), flag.name


def test_types() -> None:
    kinds = {name: (flag.kind, flag.many, flag.optional) for name, flag in by_name().items()}
    assert kinds["num_layers"] == (int, False, True)
    assert kinds["lr"] == (float, False, True)
    assert kinds["exit_layer_nums"] == (int, True, False)
    assert kinds["distributed_backend"] == (str, False, True)
    assert by_name()["distributed_backend"].choices == ("nccl", "gloo")


def test_defaults_have_their_type() -> None:
    for flag in all_flags():
        if flag.default is not None:
            assert type(flag.default) is (tuple if flag.many else flag.kind), flag.name


def test_no_spelling_has_two_meanings() -> None:
    words = [word for flag in all_flags() for word in (flag.flag, *flag.aliases, *flag.shorthands)]
    words += [opposite(flag) for flag in all_flags() if flag.kind is bool]
    assert Counter(words).most_common(1)[0][1] == 1
    assert set(words) == set(spellings())


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("lr", ["3e-4"], 3e-4),
        ("num_layers", ["12"], 12),
        ("exit_layer_nums", ["2", "4"], (2, 4)),
        ("exit_layer_weight", ["0.25"], (0.25,)),
        ("split", ["949,50,1"], "949,50,1"),
        ("data_path", ["0.5", "a b"], ("0.5", "a b")),
        ("normalization", ["RMSNorm"], "RMSNorm"),
    ],
)
def test_words(name: str, words: list[str], value: object) -> None:
    assert from_words(by_name()[name], words) == value


@pytest.mark.parametrize(
    ("name", "words", "fault"),
    [
        ("num_layers", ["x"], "'x' is not a whole number"),
        ("num_layers", ["1.0"], "'1.0' is not a whole number"),
        ("num_layers", [], "takes one value, got none"),
        ("num_layers", ["1", "2"], "takes one value, got 1 2"),
        ("lr", ["nan"], "not a finite number"),
        ("lr", ["inf"], "not a finite number"),
        ("exit_layer_nums", [], "at least one value"),
        ("normalization", ["BatchNorm"], "not one of LayerNorm, RMSNorm"),
        ("pipeline_schedule", ["zb-v"], "not one of 1f1b, gpipe, interleaved, zb-h1"),
    ],
)
def test_bad_words(name: str, words: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        from_words(by_name()[name], words)


@pytest.mark.parametrize(
    ("name", "data", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("num_layers", 4, 4),
        ("num_layers", None, None),
        ("swiglu", True, True),
        ("exit_layer_nums", 4, (4,)),
        ("exit_layer_nums", [2, 4], (2, 4)),
        ("exit_layer_nums", None, ()),
        ("data_path", [0.5, "a", 0.5, "b"], ("0.5", "a", "0.5", "b")),
        ("wandb_save_dir", "", ""),
    ],
)
def test_plain_data(name: str, data: object, value: object) -> None:
    read = from_plain(by_name()[name], data)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("num_layers", "big", "'big' is not a whole number"),
        ("num_layers", 1.5, "1.5 is not a whole number"),
        ("num_layers", True, "True is not a whole number"),
        ("num_layers", [1], "not a whole number"),
        ("lr", False, "False is not a number"),
        ("lr", float("nan"), "not a finite number"),
        ("swiglu", 1, "neither true nor false"),
        ("swiglu", None, "neither true nor false"),
        ("seed", None, "None is not a whole number"),
        ("split", 5, "5 is not text"),
        ("normalization", "x", "not one of"),
    ],
)
def test_bad_plain_data(name: str, data: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        from_plain(by_name()[name], data)


def test_build_keeps_the_rest() -> None:
    base = build({"lr": 1.0, "num_layers": 3}, RunConfig())
    config = build({"num_layers": 4}, base)
    assert (config.model.num_layers, config.learning_rate.lr) == (4, 1.0)
    assert base.model.num_layers == 3
