"""A config survives every way it is written down: flags, JSON, YAML."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from megatron.config.fields import build
from megatron.config.flags import read_argv, to_argv
from megatron.config.load import from_dict, load, save_config, to_dict
from megatron.config.rules import broken
from megatron.config.run import RunConfig
from tests.unit.config.strategies import any_config, valid_config

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
full = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


def _typed_config_survives(config: RunConfig) -> None:
    answers, _ = read_argv(to_argv(config), "entry")
    assert answers.problems == []
    again = build(answers.values, RunConfig())
    assert again == config
    assert to_argv(again) == to_argv(config)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert isinstance(broken(config), list)  # no rule stumbles over another one's fault


def _valid_config_loads(config: RunConfig) -> None:
    once = load(to_argv(config)).config
    assert once == config
    assert load(to_argv(once)).config == once


@quick
@given(any_config())
def test_typed_config_survives(config: RunConfig) -> None:
    _typed_config_survives(config)


@quick
@given(valid_config())
def test_valid_config_loads(config: RunConfig) -> None:
    _valid_config_loads(config)


@pytest.mark.slow
@full
@given(any_config())
def test_typed_config_survives_1000(config: RunConfig) -> None:
    _typed_config_survives(config)


@pytest.mark.slow
@full
@given(valid_config())
def test_valid_config_loads_1000(config: RunConfig) -> None:
    _valid_config_loads(config)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@settings(quick, max_examples=40)
@given(config=valid_config())
def test_saved_config_is_a_config_file(tmp_path: Path, suffix: str, config: RunConfig) -> None:
    path = tmp_path / f"config.{suffix}"
    save_config(path, config)
    assert load(["--config", str(path)]).config == config
