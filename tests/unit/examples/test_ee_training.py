"""The launch scripts of large models: what they ask for is valid and fits, what they lack they name."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron.config.load import load

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "examples" / "ee_training"
SIZES = {"1-3B": ("1.27B", (1, 4)), "7B": ("6.95B", (1, 4)), "13B": ("13.23B", (2, 4)), "30B": ("32.72B", (4, 4))}
GIVEN = {"DATA_PATH": "0.7 web 0.3 code", "TOKENIZER_PATH": "t.model", "CHECKPOINT_PATH": "out", "GPUS_PER_NODE": "8"}


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    own = {"DRY_RUN", "DEVICE", "TP", "PP", "MICRO_BATCH", "GLOBAL_BATCH", "NNODES", "NODE_RANK", "PYTHON", *GIVEN}
    environment = {name: value for name, value in os.environ.items() if name not in own} | {"OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPTS / script), *words]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that says what it was asked to do, a word a line."""
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("size", SIZES)
def test_dry_runs_fit(size: str) -> None:
    parameters, (tp, pp) = SIZES[size]
    done = run(f"{size}.sh", DRY_RUN="1", GPUS_PER_NODE="8", DEVICE="A100-80GB")
    assert done.returncode == 0, done.stderr
    assert f"{parameters} parameters" in done.stdout and f"tp={tp} pp={pp}" in done.stdout
    assert "4,194,304 tokens a step" in done.stdout and "it fits" in done.stdout


def test_one_gpu() -> None:
    done = run("1-3B.sh", DRY_RUN="1", TP="1", PP="1", GPUS_PER_NODE="1", DEVICE="A100-80GB")
    assert "on 1 x A100-80GB: tp=1 pp=1 dp=1" in done.stdout and done.returncode == 0


@pytest.mark.parametrize("size", SIZES)
def test_flags_are_those_of_the_paper_s_runs(size: str, echo: str) -> None:
    done = run(f"{size}.sh", "--seed", "7", PYTHON=echo, **GIVEN, NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    place = words.index("pretrain_early_exit_gpt.py")
    launcher = shlex.join(words[:place])
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr first" in launcher
    config = load(words[place + 1 :]).config
    model, training, rate = config.model, config.training, config.learning_rate
    assert (model.seq_length, model.init_method_std, model.hidden_dropout) == (2048, 0.01, 0.1)
    assert (training.global_batch_size, training.seed) == (2048, 7)
    assert (rate.lr, rate.min_lr, rate.lr_warmup_iters) == (3e-4, 3e-5, 2000)
    assert config.parallel.sequence_parallel == (config.parallel.tensor_model_parallel_size > 1)
    assert model.untie_embeddings_and_output_weights == (size != "1-3B") == config.exits.untie_exit_output_weights
    assert config.exits.pre_exit and config.exits.exit_layer_nums[0] == model.num_layers // 4 + 1
    assert config.data.data_path == ("0.7", "web", "0.3", "code")


@pytest.mark.parametrize("missing", ["DATA_PATH", "TOKENIZER_PATH", "CHECKPOINT_PATH"])
def test_what_is_missing_is_named(missing: str) -> None:
    done = run("7B.sh", **{name: value for name, value in GIVEN.items() if name != missing})
    assert done.returncode == 2 and f"error: {missing} is not set" in done.stderr


def test_wrong_variables_are_named(echo: str) -> None:
    assert "TP is 'two'" in run("7B.sh", TP="two", **GIVEN).stderr
    assert "MASTER_ADDR is not set" in run("7B.sh", NNODES="2", PYTHON=echo, **GIVEN).stderr


def test_help_lists_the_variables() -> None:
    done = run("13B.sh", "--help")
    assert done.returncode == 0 and all(name in done.stdout for name in GIVEN)
    assert "sbatch --nodes 4" in run("slurm.sh", "--help").stdout


def test_a_slurm_job_starts_the_script_once_a_node(tmp_path: Path, echo: str) -> None:
    """With an `srun` that plays the second of two tasks."""
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nSLURM_NODEID=1 exec "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'alpha\\nbeta\\n'\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "[alpha,beta]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12"}
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run("slurm.sh", "30B", "--seed", "7", PYTHON=echo, **GIVEN, **job, **paths)
    words = shlex.join(done.stdout.splitlines())
    assert "--nnodes 2 --node-rank 1 --master-addr alpha --master-port 20012" in words, done.stderr
    assert words.endswith("--seed 7")
    assert "submit from the repository" in run("slurm.sh", "8B", **job, **paths).stderr
