"""Every flag of Megatron-LM and EE-LLM is in exactly one of three classes."""

from collections import Counter
from pathlib import Path

import pytest

from megatron.config.fields import all_flags, spellings
from megatron.config.flags import read_argv
from megatron.config.refused import ACCEPTED, REFUSED_VALUES, accepted, attribute, refused

# The attributes that EE-LLM's flags set, and five that it removes after parsing because they are deprecated.
ATTRIBUTES = (Path(__file__).parent / "megatron_attributes.txt").read_text().split()


def class_of(name: str) -> list[str]:
    """The classes that a Megatron attribute, or its flag, belongs to."""
    ours = {flag.name for flag in all_flags()} | {word.removeprefix("--").replace("-", "_") for word in spellings()}
    ours.add("add_position_embedding")  # the attribute of --no-position-embedding
    classes = {"honoured": ours}
    classes["accepted"] = {attribute(flag) for flag in accepted()}
    classes["refused"] = {attribute(flag) for flag in refused()}
    return [kind for kind, names in classes.items() if name in names]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_is_in_one_class(name: str) -> None:
    assert len(class_of(name)) == 1, class_of(name)


def test_the_list_is_whole() -> None:
    assert len(ATTRIBUTES) == len(set(ATTRIBUTES)) == 260


def test_no_flag_is_in_two_classes() -> None:
    words = [*spellings(), *(entry.flag for entry in ACCEPTED), *refused()]
    assert [word for word, count in Counter(words).items() if count > 1] == []


@pytest.mark.parametrize("flag", refused())
def test_refused_flags_say_why(flag: str) -> None:
    (problem,) = read_argv([flag, "1"], "entry")[0].problems
    assert problem == f"{flag}: {refused()[flag]}"


@pytest.mark.parametrize("entry", ACCEPTED, ids=lambda entry: entry.flag)
def test_accepted_flags_take_as_many_values_as_in_megatron(entry) -> None:
    words = [entry.only[0] if entry.only else "1"] * entry.values
    assert read_argv([entry.flag, *words], "entry")[0].problems == []
    assert "takes" in read_argv([entry.flag, *words, "extra"], "entry")[0].problems[0]


@pytest.mark.parametrize(("flag", "value"), REFUSED_VALUES)
def test_refused_values_say_why(flag: str, value: str) -> None:
    assert flag in spellings()
    (problem,) = read_argv([flag, value], "entry")[0].problems
    assert REFUSED_VALUES[flag, value] in problem
