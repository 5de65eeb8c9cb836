import dataclasses
import json

import pytest

from megatron.checkpoint import native
from megatron.checkpoint.run_facts import check_run_facts, read_run_facts
from megatron.checkpoint.state import RunState
from megatron.config.run import RunConfig
from megatron.config.stored import to_dict
from megatron.errors import CheckpointError
from megatron.optim.lr import LrSchedule, WeightDecaySchedule
from megatron.optim.scaler import LossScaler


@pytest.fixture
def facts():
    return {
        "config": to_dict(RunConfig()),
        "tokenizer": "0" * 64,
        "consumed_samples": 8,
        "optimizer_samples": 8,
        "optimizer_step": 2,
        "skipped_steps": 0,
        "run": 1,
        "grad_scaler": LossScaler(overflows_left=-1).facts(),
        "opt_param_scheduler": {
            "learning_rate": dataclasses.asdict(LrSchedule(1e-3, 0.0, "cosine", 100)),
            "weight_decay": dataclasses.asdict(WeightDecaySchedule(0.1, 0.1)),
        },
    }


def test_what_a_run_saves_is_taken(tmp_path, facts):
    directory = native.save(tmp_path, 2, RunState({}, {**facts, "torch": "2.11"}))
    assert facts.items() <= read_run_facts(directory).items()


def test_every_key_is_needed(tmp_path, facts):
    whole = {**facts, "iteration": 2}
    check_run_facts(whole, tmp_path)
    for key in whole:
        with pytest.raises(CheckpointError, match=f"facts.json lacks {key}"):
            check_run_facts({name: value for name, value in whole.items() if name != key}, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("iteration",), "7", "iteration is '7'"),
        (("consumed_samples",), -1, "consumed_samples is -1"),
        (("optimizer_step",), None, "optimizer_step is None"),
        (("tokenizer",), 3, "tokenizer is 3"),
        (("config",), [], "config is a list"),
        (("config", "model"), "gpt", "config: model is 'gpt'"),
        (("grad_scaler", "scale"), "x", "grad_scaler: scale is 'x'"),
        (("opt_param_scheduler", "learning_rate"), 1.0, "opt_param_scheduler: learning_rate is 1.0"),
        (("opt_param_scheduler", "learning_rate", "max_lr"), "x", "learning_rate: max_lr is 'x'"),
        (("opt_param_scheduler", "weight_decay", "cycles"), 3, "weight_decay has cycles, which this .* update it"),
    ],
)
def test_odd_values_are_named(tmp_path, facts, path, value, message):
    directory = native.save(tmp_path, 2, RunState({}, facts))
    data = json.loads((directory / "facts.json").read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (directory / "facts.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"facts.json.*{message}"):
        read_run_facts(directory)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_every_field_of_a_schedule_is_needed(tmp_path, facts, name):
    schedule = facts["opt_param_scheduler"][name]
    for key in list(schedule):
        value = schedule.pop(key)
        with pytest.raises(CheckpointError, match=f"{name} lacks {key}"):
            check_run_facts({**facts, "iteration": 2}, tmp_path)
        schedule[key] = value
