"""Layers over pipeline stages: equal ones, virtual ones, and Megatron-LM's layouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.layout import read_layout, stage_depths, write_layout
from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError


def parallel(pp: int, **flags: object) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=pp, **flags)


@pytest.mark.parametrize(
    ("text", "depths"),
    [
        ("EtL", (1,)),
        ("Et*3|t*5|t*4L", (3, 5, 4)),
        ("Et, t, t | t*4 | (tt|)*2 tL", (3, 4, 2, 2, 1)),
        ("E|t*2|t*2|L", (0, 2, 2, 0)),
        ("E((t|)*2t|)*2tL", (1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_a_layout_is_read(text: str, depths: tuple[int, ...]) -> None:
    assert read_layout(text) == depths


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_layout_is_read_as_it_was_written(depths: list[int]) -> None:
    assert read_layout(write_layout(tuple(depths))) == tuple(depths)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "stage 0 is '', expected 'EL'"),
        ("tt|tL", "stage 0 is 'tt', expected 'Ett'"),
        ("Et|t", "stage 1 is 't', expected 'tL'"),
        ("Et|Et|tL", "stage 1 is 'Et', expected 't'"),
        ("Et||tL", "stage 1 is empty"),
        ("Etm|tL", "multi-token prediction is not supported"),
        ("Ex|L", "'x' is none of"),
        ("((t", "'(' is none of"),
        ("E(t*99999)*99999|L", "repeats too much"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_layout(text)
    assert complaint in str(error.value)


def test_stages_are_equal_unless_a_layout_says_otherwise() -> None:
    assert stage_depths(parallel(4), 8) == (2, 2, 2, 2)
    assert stage_depths(parallel(2, num_layers_per_virtual_pipeline_stage=1), 4) == (1, 1, 1, 1)
    assert stage_depths(parallel(2, pipeline_model_parallel_layout="Et|t*3|t*2|tL"), 7) == (1, 3, 2, 1)


@pytest.mark.parametrize(
    ("config", "layers", "complaint"),
    [
        (parallel(2), 5, "2 does not divide --num-layers 5: give stages of other depths"),
        (parallel(2, num_layers_per_virtual_pipeline_stage=3), 8, "3 on 2 pipeline ranks does not divide"),
        (parallel(2, pipeline_model_parallel_layout="Et|t|tL"), 3, "3 stages don't spread over"),
        (parallel(2, pipeline_model_parallel_layout="Et|tL"), 3, "it has 2 layers, --num-layers 3"),
        (
            parallel(2, pipeline_model_parallel_layout="Et|tL", num_layers_per_virtual_pipeline_stage=1),
            2,
            "leave that out",
        ),
    ],
)
def test_layers_that_cannot_be_spread_are_refused(config: ParallelConfig, layers: int, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        stage_depths(config, layers)
    assert complaint in str(error.value)
