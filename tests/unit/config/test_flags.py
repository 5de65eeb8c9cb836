"""The command line: legacy spellings, opposites, contradictions, and faults reported together."""

import pytest

from megatron.config.fields import build
from megatron.config.flags import Answers, read_argv, to_argv, unknown
from megatron.config.run import RunConfig


def read(line: str) -> Answers:
    return read_argv(line.split(), "entry")[0]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--use-rotary-position-embeddings", "position_embedding_type", "rope"),
        ("--no-position-embedding", "position_embedding_type", "none"),
        ("--use-rotary-position-embeddings --no-position-embedding", "position_embedding_type", "rope"),
        ("--no-position-embedding --position-embedding-type rope", "position_embedding_type", "rope"),
        ("--use-exit-norm", "exit_norm", "own"),
        ("--use-exit-norm --exit-norm own", "exit_norm", "own"),
        ("--recompute-activations", "recompute_granularity", "selective"),
        ("--layernorm-epsilon 1e-6", "norm_epsilon", 1e-6),
        ("--encoder-num-layers 3", "num_layers", 3),
        ("--tensorboard-log-interval 7", "tracker_log_interval", 7),
        ("--disable-bias-linear", "add_bias_linear", False),
        ("--add-bias-linear", "add_bias_linear", True),
        ("--no-save-optim", "save_optim", False),
        ("--save-optim", "save_optim", True),
        ("--no-swiglu", "swiglu", False),
        ("--override-opt-param-scheduler", "override_opt_param_scheduler", True),
        ("--seed 1 --seed 2", "seed", 2),
        ("--seed=3", "seed", 3),
        ("--rampup-batch-size 16 8 3000", "rampup_batch_size", (16, 8, 3000)),
    ],
)
def test_spellings(line: str, name: str, value: object) -> None:
    answers = read(line)
    assert answers.problems == []
    assert answers.values == {name: value}


@pytest.mark.parametrize(
    "line",
    [
        "--use-exit-norm --exit-norm final",
        "--swiglu --no-swiglu",
        "--recompute-activations --recompute-granularity full",
        "--use-rotary-position-embeddings --position-embedding-type learned_absolute",
    ],
)
def test_contradictions(line: str) -> None:
    (problem,) = read(line).problems
    assert "contradict each other" in problem
    assert all(word in problem for word in line.split() if word.startswith("--"))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("--hiden-size 3", "--hiden-size: unknown; did you mean --hidden-size?"),
        ("--hidden_size 3", "did you mean --hidden-size?"),
        ("--hidden 3", "--hidden: unknown"),  # no abbreviations
        ("--xyzzy 1 2", "--xyzzy: unknown; --help lists what there is"),
        ("-x", "-x: unknown"),
        ("stray --seed 1", "unexpected 'stray'"),
        ("--swiglu true", "--swiglu: takes no value, got true"),
        ("--swiglu=true", "--swiglu: takes no value, got true"),
        ("--seed", "--seed: takes one value, got none"),
        ("--config", "--config: takes one file, got none"),
        ("--context-parallel-size 2", "--context-parallel-size 2: context parallelism is not there yet"),
        ("--num-experts 4", "--num-experts: mixture-of-experts layers are not there yet"),
        ("--tie-exit-output-weights", "not in this version yet"),
        ("--transformer-impl transformer_engine", "Transformer Engine"),
        ("--timing-log-level 7", "not one of 0, 1, 2"),
        ("--use-flash-attn 1", "--use-flash-attn: takes no value, got 1"),
        ("--local_rank", "--local_rank: takes one value, got none"),
    ],
)
def test_one_fault(line: str, fault: str) -> None:
    (problem,) = read(line).problems
    assert fault in problem


def test_faults_come_together() -> None:
    problems = read("--hiden-size 3 --lr x --num-experts 4 --normalization Z --foo 1").problems
    assert len(problems) == 5


def test_accepted_flags_are_remembered() -> None:
    answers = read("--use-flash-attn --local_rank 0 --transformer-impl local --log-memory-to-tensorboard")
    assert (answers.problems, answers.values) == ([], {})
    assert answers.accepted == [
        "--use-flash-attn",
        "--local_rank",
        "--transformer-impl",
        "--log-memory-to-tensorboard",
    ]


def test_config_file_is_named() -> None:
    assert read_argv(["--config", "a.yaml"], "entry")[1] == "a.yaml"


def test_to_argv_says_only_what_differs() -> None:
    assert to_argv(RunConfig()) == []
    values = {"num_layers": 4, "add_bias_linear": False, "exit_layer_nums": (2,), "lr": 1e-3}
    assert to_argv(build(values, RunConfig())) == (
        ["--num-layers", "4", "--disable-bias-linear", "--exit-layer-nums", "2", "--lr", "0.001"]
    )


def test_to_argv_joins_what_looks_like_a_flag() -> None:
    config = build({"save": "--odd", "wandb_group": ""}, RunConfig())
    assert to_argv(config) == ["--save=--odd", "--wandb-group="]
    assert build(read_argv(to_argv(config), "entry")[0].values, RunConfig()) == config


def test_unknown_without_neighbour() -> None:
    assert unknown("zzz", ["abc"]) == "zzz: unknown; --help lists what there is"


def test_help_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_argv(["--help"], "pretrain.py")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: pretrain.py [--config FILE] [flags]")
