"""The front door of configuration: command line (and `--config` file) in, a checked RunConfig out.

Reads no file but the one that `--config` names. What lies beside checkpoints is stored.py's, offered here too.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.config import refused
from megatron.config.fields import all_flags, build, by_name, from_plain, spellings
from megatron.config.flags import Answers, known_flags, read_argv, unknown
from megatron.config.idle import without_effect
from megatron.config.problems import raise_if_any
from megatron.config.rules import broken, check_training
from megatron.config.run import RunConfig
from megatron.config.stored import PER_EXIT, from_checkpoint, from_dict, merge_checkpoint_args, save_config, to_dict
from megatron.errors import ConfigError

__all__ = [
    "Loaded",
    "check_training",
    "from_checkpoint",
    "from_dict",
    "load",
    "merge_checkpoint_args",
    "save_config",
    "to_dict",
]


_MOST_NODES = 100_000  # of a config file


@dataclass(frozen=True)
class Loaded:
    """What the user asked for: the config, the fields that were given by name, and lines to log."""

    config: RunConfig
    given: frozenset[str]
    notes: tuple[str, ...]


def load(argv: Sequence[str], entry: str = "pretrain_early_exit_gpt.py", base: RunConfig | None = None) -> Loaded:
    """Read a command line (without the program's name) and check it.

    `base` supplies what is not given: a checkpoint's config, or the defaults; where other exits are given, its
    lists with one value per exit do not apply. With `--use-checkpoint-args` the
    rules of model and exits wait for `merge_checkpoint_args`.
    Raises ConfigError naming every fault at once; `--help` prints and exits with 0.
    """
    answers, config_file = read_argv(argv, entry)
    from_file = Answers() if config_file is None else read_config_file(config_file)
    values = from_file.values | answers.values
    base = base or RunConfig()
    stale = _stale_lists(values, base)
    config = build(values | dict.fromkeys(stale, ()), base)
    problems = [*(f"{config_file}: {fault}" for fault in from_file.problems), *answers.problems]
    rules = broken(config, shape=not config.checkpoint.use_checkpoint_args)
    raise_if_any(problems + _unrelated(rules, from_file.problems + answers.problems))
    notes = list(without_effect(config))
    if stale:
        notes.append(f"left out, as --exit-layer-nums names other exits than before: {', '.join(stale)}")
    if accepted := dict.fromkeys(from_file.accepted + answers.accepted):
        notes.insert(0, f"accepted without effect: {', '.join(accepted)}")
    return Loaded(config, frozenset(values), tuple(notes))


def _stale_lists(values: Mapping[str, Any], base: RunConfig) -> list[str]:
    """The base's lists with one value per exit, where the exits are other ones now and the list wasn't given."""
    if values.get("exit_layer_nums", base.exits.exit_layer_nums) == base.exits.exit_layer_nums:
        return []
    return [name for name in PER_EXIT if getattr(base.exits, name) and name not in values]


def _unrelated(faults: list[str], problems: list[str]) -> list[str]:
    """The faults about no flag that `problems` name already: those only follow from a value that wasn't read."""
    named = {word.lstrip("-").replace("_", "-") for word in re.findall(r"[\w-]+", " ".join(problems))}
    return [fault for fault in faults if not named & set(re.findall(r"(?<=--)\w[\w-]*", fault))]


def read_config_file(path: str) -> Answers:
    """Read a YAML or JSON mapping of settings, flat or in sections, keys with dashes or underscores.

    Its faults are in the answers; raises ConfigError if the file cannot be read at all.
    """
    answers = Answers()
    sections = {flag.section for flag in all_flags()}
    try:
        for key, value in _parse(path).items():
            inside = value.items() if key in sections and isinstance(value, dict) else [(key, value)]
            for name, one in inside:
                _take(answers, str(name), one)
    except RecursionError as error:
        raise ConfigError(f"--config {path} is nested too deeply: settings are flat or in sections") from error
    return answers


def _parse(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text) if path.endswith(".json") else _from_yaml(text)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a readable file") from error
    except (ValueError, LookupError, AttributeError, yaml.YAMLError) as error:  # not UTF-8, not the format, or no such
        # date, number or truth: PyYAML looks those up
        raise ConfigError(f"--config {path} is not valid {_format(path)}: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path}: expected keys and values, found {type(data).__name__}")
    return data


def _from_yaml(text: str) -> Any:
    loader = _YAML(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _YAML(yaml.SafeLoader):
    """With aliases (*name) as long as what they stand for stays small: a few of them can fill any memory."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > _MOST_NODES:
            raise yaml.YAMLError("its aliases stand for far more than settings need")
        return node


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there are with every alias written out; infinity for one that stands in itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        inner = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        parts = () if isinstance(node, yaml.ScalarNode) else inner
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _format(path: str) -> str:
    return "JSON" if path.endswith(".json") else "YAML"


def _take(answers: Answers, key: str, value: Any) -> None:
    """Record one key of a config file: a field's name, or any spelling of a flag."""
    word = f"--{key.lstrip('-')}"
    if word not in known_flags():
        word = word.replace("_", "-")
    flag = by_name().get(key.lstrip("-").replace("-", "_"))
    if flag is None and word in spellings():
        flag, constant = spellings()[word]
        if constant is not None:
            if value is not None and not isinstance(value, bool):
                answers.problems.append(f"{key}: {value!r} is neither true nor false")
            elif value:
                answers.set(flag, constant, word)
            return
    if flag is None:
        _take_foreign(answers, key, word, value)
    elif value is not None or not (flag.optional or flag.many):
        try:
            answers.set(flag, from_plain(flag, value), word)
        except ValueError as error:
            answers.problems.append(f"{key}: {error}")


def _take_foreign(answers: Answers, key: str, word: str, value: Any) -> None:
    """Record a key that is no setting of ours; one that is switched off asks for nothing."""
    if word in ("--config", "--help"):
        answers.problems.append(f"{key}: can't stand in a file; give {word} on the command line")
    elif word not in refused.accepted() and word not in refused.refused():
        answers.problems.append(unknown(key, [*by_name(), *(flag.removeprefix("--") for flag in known_flags())]))
    elif value is not None and value is not False:
        takes_none = value is True
        words = [] if takes_none else [str(one) for one in (value if isinstance(value, list) else [value])]
        answers.foreign(word, words)
