"""The check of a cluster: healthy processes, a slow one, one that fails, and a wrong gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.cli.check_cluster import main
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.testing.ranks import Ranks
from megatron.train.selfcheck import TOLERANCE, Difference, Layout, toy_config, toy_step, worst_difference

SCRIPT = Path(__file__).parents[2] / "tools" / "check_cluster.py"
ONE_IS_ARMED = '[ "$RANK" = 1 ] && export EE_LLM_FAULTS="$OF_RANK_1"; exec "$@"'
SLOW = "measure.multiply:delay=0.05"


def check(ranks: int, *words: str, faults: str = "") -> subprocess.CompletedProcess:
    """The tool under torchrun, with these faults armed in rank 1."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "--no-python", "bash", "-c", ONE_IS_ARMED, "bash", sys.executable, str(SCRIPT), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OF_RANK_1": faults}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=False)


def test_two_processes_of_which_one_is_slow(tmp_path: Path) -> None:
    """Slow is no failure by itself; every layout is right."""
    output = tmp_path / "cluster.json"
    done = check(2, "--output", str(output), faults=SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(output.read_text(encoding="utf-8"))
    assert "rank 1" in kept["slow"][0] and "matrix products" in kept["slow"][0]
    assert kept["slow"][0] in done.stdout
    assert kept["ranks"][1]["flops_per_second"] < 0.8 * kept["ranks"][0]["flops_per_second"]
    assert {link["operation"] for link in kept["links"]} == {"all_reduce", "all_gather", "reduce_scatter", "send_recv"}
    assert all(group["bytes_per_second"] > 0 for link in kept["links"] for group in link["groups"])
    assert (len(kept["layouts"]), kept["not_tried"], kept["wrong"]) == (8, [], [])
    assert all(tried["error"] < kept["tolerance"] for tried in kept["layouts"])


def test_a_missing_directory_is_said_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--output", str(tmp_path / "none" / "cluster.json")]) == 2
    assert "make it first" in capsys.readouterr().err


def test_one_process_measures_itself(capsys: pytest.CaptureFixture) -> None:
    assert main(["--distributed-backend", "gloo"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 process on 1 machine, gloo") and "0 wrong, 0 slow" in said


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    output = tmp_path / "cluster.json"
    done = check(4, "--dtype", "fp64", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(output.read_text(encoding="utf-8"))
    assert (len(kept["layouts"]), kept["not_tried"], kept["wrong"]) == (28, [], [])


@pytest.mark.slow
def test_what_there_is_no_time_for_is_said() -> None:
    done = check(2, "--time-limit", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no time for: tp=2 pp=1 dp=1, sequence parallel" in done.stdout and "9 not tried" in done.stdout


@pytest.mark.slow
def test_a_slow_process_fails_a_strict_check() -> None:
    done = check(2, "--strict", faults=SLOW)
    assert done.returncode == 1
    assert done.stderr.count("error: rank 1") == 1


@pytest.mark.slow
def test_a_process_that_fails_says_so_once() -> None:
    done = check(2, faults="cluster.step@3:raise")
    assert done.returncode == 1
    assert done.stderr.count("failed at a step with") == 1
    assert "error: [rank 1] rank 1" in done.stderr and "InjectedFault" in done.stderr


def compare(mesh: Mesh, layout: Layout, dtype: torch.dtype, spoilt: tuple[int, str] | None = None) -> Difference:
    """What differs most from one process; spoilt: rank and gradient that is a hundredth too large."""
    world = mesh.world_size
    alone = toy_step(toy_config(world, world, Layout()), dtype, ONE_RANK)
    found = toy_step(toy_config(world, world, layout), dtype, mesh)
    if spoilt and spoilt[0] == mesh.world_rank:
        found.gradients[spoilt[1]].view.mul_(1.01)
    return worst_difference(found, alone)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pipeline_is_right_in_every_precision(ranks: Ranks, schedule: str, dtype: torch.dtype) -> None:
    layout = Layout(pp=2, schedule=schedule)
    assert max(ranks.run(compare, layout, dtype, pp=2)).error < TOLERANCE[dtype]


def test_a_wrong_gradient_is_named(ranks: Ranks) -> None:
    name = "layers.1.mlp.up.weight"
    healthy, wrong = ranks.run(compare, Layout(tp=2), torch.float32, (1, name), tp=2)
    assert healthy.error < TOLERANCE[torch.float32]
    assert wrong.what == f"gradient of {name}"
    assert wrong.error == pytest.approx(0.01, rel=0.01)


def made_and_given_back(mesh: Mesh) -> tuple[int, int]:
    """Groups that this rank is in while a layout is tried, and after."""
    toy_step(toy_config(2, 2, Layout(pp=2)), torch.float32, mesh)
    during = len(torch.distributed.distributed_c10d._world.pg_map)
    mesh.release()
    return during, len(torch.distributed.distributed_c10d._world.pg_map)


def test_a_layout_gives_its_groups_back(ranks: Ranks) -> None:
    for during, after in ranks.run(made_and_given_back, pp=2):
        assert during > 5
        assert after == 1
