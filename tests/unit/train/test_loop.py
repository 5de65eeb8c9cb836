"""The training loop through its command line: metrics, evaluation, stopping, and steps that go wrong."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megatron import faults
from megatron.checkpoint.find import recognise
from megatron.cli.pretrain import main
from megatron.config.model import ModelConfig
from megatron.data.gpt import GPTDataset
from megatron.errors import DataError
from megatron.train import checkpoints
from tests.unit.train.conftest import Runs, steps

ROOT = Path(__file__).resolve().parents[3]


def test_metrics_lines(runs: Runs) -> None:
    lines = runs.train("m", eval_interval=10, log_params_norm=True, log_num_zeros_in_grad=True)
    training = [line for line in lines if "loss/final" in line]
    assert [line["iteration"] for line in training] == list(range(1, 21))
    last = training[-1]
    assert last["consumed_samples"] == 160
    assert last["consumed_tokens"] == 160 * 24
    assert training[0]["lr"] == 0.0 and training[3]["lr"] == pytest.approx(2e-3)
    assert last["weight/exit_1"] == 0.25 and last["weight/exit_3"] == 0.5
    for key in ("loss/final", "loss/exit_1", "loss/exit_3", "grad_norm", "loss_scale", "step_time_s", "tokens_per_s",
                "peak_memory_bytes", "params_norm", "num_zeros_in_grad"):  # fmt: skip
        assert isinstance(last[key], (int, float)), key
    assert training[-1]["loss/final"] < training[0]["loss/final"]
    evaluations = [line for line in lines if "eval/loss/final" in line]
    assert [line["iteration"] for line in evaluations] == [10, 20]
    for place in ("final", "exit_1", "exit_3"):
        assert evaluations[0][f"eval/ppl/{place}"] == pytest.approx(math.exp(evaluations[0][f"eval/loss/{place}"]))
        assert 0 <= evaluations[0][f"eval/accuracy/{place}"] <= 1
    assert 0 <= evaluations[0]["eval/agreement/exit_1"] <= 1
    assert any("test/loss/final" in line for line in lines)


def test_console_names(runs: Runs, capfd: pytest.CaptureFixture) -> None:
    runs.train("m")
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(" iteration"))
    for part in ("lm loss:", "early loss [1]:", "early loss [3]:", "learning rate:", "grad norm:",
                 "tokens per second:", "model TFLOP/s:", "peak memory", "ETA:"):  # fmt: skip
        assert part in line


def test_trains_without_exits_and_in_other_precisions(runs: Runs) -> None:
    none = {"exit_layer_nums": None, "exit_layer_weight": None}
    lines = steps(runs.train("none", **none))
    assert not any("exit" in key for key in lines[0])
    for name, changes in {"bf16": {"bf16": True}, "fp16": {"fp16": True, "initial_loss_scale": 2.0**17}}.items():
        other = steps(runs.train(name, **none, **changes))
        applied = [line for line in other if not line.get("skipped")]
        assert applied[-1]["loss/final"] == pytest.approx(lines[-1]["loss/final"], rel=0.1), name


def test_fp16_scales_exit_losses_too(runs: Runs) -> None:
    """The whole objective is multiplied by the loss scale, so the scale changes no gradient."""
    exits = {"exit_layer_weight": "1.0 1.0", "attention_dropout": 0, "hidden_dropout": 0, "train_iters": 4}
    low = steps(runs.train("low", fp16=True, loss_scale=1, **exits))
    high = steps(runs.train("high", fp16=True, loss_scale=1024, **exits))
    for a, b in zip(low, high, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)
        assert b["loss_scale"] == 1024


def test_fp16_overflow_skips_and_lowers_the_scale(runs: Runs) -> None:
    lines = steps(runs.train("m", fp16=True, initial_loss_scale=2.0**26, hysteresis=1))
    skipped = [line for line in lines if line.get("skipped")]
    assert skipped and skipped[0]["iteration"] == 1
    assert lines[-1]["loss_scale"] < 2.0**26
    first_applied = next(line for line in lines if not line.get("skipped"))
    assert first_applied["lr"] == 0.0  # schedules stand still on skipped steps


def test_a_model_beyond_the_memory_is_refused(runs: Runs, capfd) -> None:
    assert main(runs.flags(seq_length=10**12, max_position_embeddings=10**12)) == 2
    assert "does not fit into memory" in capfd.readouterr().err


def test_skip_train_evaluates_a_checkpoint(runs: Runs) -> None:
    """Weights alone are enough, and the numbers are those of the evaluation at the end of training."""
    save = runs.root / "save"
    trained = runs.train("m", save=save, no_save_optim=True)
    lines = runs.train("e", load=save, skip_train=True)
    assert not steps(lines)
    at_the_end = next(line for line in trained if "eval/loss/final" in line)
    numbers = {key: value for key, value in at_the_end.items() if key.startswith("eval/")}
    assert lines[0]["iteration"] == 20
    assert {key: lines[0][key] for key in numbers} == numbers


class Process:
    """A run in a process group of its own, waited for by its metrics file."""

    def __init__(self, runs: Runs, **changes: object) -> None:
        self.metrics = runs.root / "process.jsonl"
        argv = runs.flags(**({"train_iters": 100000, "metrics_file": self.metrics} | changes))
        command = [sys.executable, str(ROOT / "pretrain_early_exit_gpt.py"), *argv]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_lines(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while not self.metrics.exists() or len(self.metrics.read_text().splitlines()) < count:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


def test_signal_to_the_whole_group_saves_and_exits_0(runs: Runs) -> None:
    """As schedulers and torchrun send it: data loading processes get it, too."""
    save = runs.root / "save"
    run = Process(runs, save=save, num_workers=2)
    run.wait_for_lines(5)
    os.killpg(run.process.pid, signal.SIGTERM)
    code, out = run.finish()
    assert code == 0, out
    assert "SIGTERM received" in out
    assert recognise(save).iteration == json.loads(run.metrics.read_text().splitlines()[-1])["iteration"]


def test_signal_during_evaluation_saves_and_exits_0(runs: Runs) -> None:
    save = runs.root / "save"
    run = Process(runs, save=save, train_iters=6, lr_warmup_iters=1, eval_interval=3, eval_iters=2000)
    run.wait_for_lines(3)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    code, out = run.finish()
    assert code == 0, out
    assert "evaluation given up" in out
    assert recognise(save).iteration == 3


def test_exit_duration(runs: Runs, capfd: pytest.CaptureFixture) -> None:
    lines = runs.train("m", train_iters=100000, exit_duration_in_mins=0.02)
    assert 1 <= len(steps(lines)) < 2000
    assert "--exit-duration-in-mins 0.02 is over" in capfd.readouterr().out


def test_tensorboard(runs: Runs) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train("m", tensorboard_dir=runs.root / "tb", tracker_log_interval=5)
    events = EventAccumulator(str(runs.root / "tb")).Reload()
    assert [point.step for point in events.Scalars("loss/exit_1")] == [5, 10, 15, 20]


def test_samples_that_are_no_multiple_of_the_batch_end_before_they_run_out(runs: Runs) -> None:
    samples = {"train_iters": None, "lr_warmup_iters": None, "train_samples": 61}
    lines = steps(runs.train("m", save=runs.root / "save", **samples))
    assert lines[-1]["consumed_samples"] == 56
    assert recognise(runs.root / "save").iteration == 7


def test_data_that_break_mid_run_leave_a_checkpoint(runs: Runs, capfd, monkeypatch) -> None:
    read = GPTDataset.__getitem__

    def broken(self: GPTDataset, index: int):
        if index == 30:
            raise DataError("corpus.bin: document 7 is unreadable at byte 123")
        return read(self, index)

    monkeypatch.setattr(GPTDataset, "__getitem__", broken)
    save = runs.root / "save"
    with faults.armed("native.facts:enospc"):  # a full disk doesn't hide the reason
        assert main(runs.flags(save=save)) == 2
    out, error = capfd.readouterr()
    assert "byte 123" in error and "No space left" in out + error
    assert main(runs.flags(save=save)) == 2
    assert "byte 123" in capfd.readouterr().err
    assert recognise(save).iteration == 3


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_save_that_cannot_be_written_is_found_before_the_first_step(runs: Runs, capfd, place: str) -> None:
    (runs.root / "file").write_text("")
    metrics = runs.root / "m.jsonl"
    assert main(runs.flags(save=runs.root / place, metrics_file=metrics)) == 5
    assert f"--save {runs.root / place}" in capfd.readouterr().err
    assert not metrics.exists()


def test_a_full_disk_under_the_metrics_file_does_not_end_the_run(runs: Runs, capfd) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    assert main(runs.flags(metrics_file="/dev/full")) == 0
    assert "MetricsFile" in capfd.readouterr().out


def test_each_start_has_its_number(runs: Runs) -> None:
    assert {line["run"] for line in runs.train("m", train_iters=5)} == {0}
    assert {line["run"] for line in runs.train("m", train_iters=5)} == {1}


def test_other_flags_on_resume_are_said(runs: Runs, capfd) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, exit_interval=2)
    runs.train("n", load=save, seed=77, split="70,20,10", adam_beta2=0.9)
    out = capfd.readouterr().out
    assert "seed: 1234 -> 77" in out and "split: 80,10,10 -> 70,20,10" in out and "adam_beta2: 0.999 -> 0.9" in out


def test_nothing_left_to_train_is_said(runs: Runs, capfd) -> None:
    last = runs.train("first", save=runs.root / "save")[-1]["iteration"]
    runs.train("again", load=runs.root / "save")
    assert f"nothing left to train: the checkpoint is at iteration {last}" in capfd.readouterr().out


def test_every_model_field_is_compared_on_load() -> None:
    """A field that changes what the model computes must not load silently different."""
    by_shape = {"hidden_size", "num_query_groups", "group_query_attention", "ffn_hidden_size", "kv_channels",
                "max_position_embeddings", "padded_vocab_size", "make_vocab_size_divisible_by", "add_bias_linear",
                "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights"}  # fmt: skip
    by_activation = {"openai_gelu", "squared_relu", "swiglu", "geglu", "bias_gelu_fusion"}
    training_only = {
        "seq_length",
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
        "init_method_xavier_uniform",
    }
    compared = {name for group, name in checkpoints._MEANING if group == "model"}
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - by_shape - by_activation - training_only <= compared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": None}, "--data-path"),
        ({"tokenizer_type": None}, "--tokenizer-type"),
        ({"vocab_size": 20}, "token"),
        ({"padded_vocab_size": 32}, "--padded-vocab-size 32 cannot hold"),
        ({"load": "nowhere"}, "--load nowhere holds no checkpoint"),
        ({"seq_length": 64, "max_position_embeddings": 32}, "--max-position-embeddings"),
        ({"exit_layer_nums": "0 3"}, "--exit-layer-nums"),
        ({"exit_layer_nums": "1 9"}, "--exit-layer-nums"),
        ({"exit_layer_nums": "1 1"}, "--exit-layer-nums"),
        ({"exit_layer_weight": "0.5"}, "--exit-layer-weight"),
        ({"num_attention_heads": 5}, "--num-attention-heads"),
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_file(runs: Runs, capfd, changes, message) -> None:
    save = runs.root / "save"
    assert main(runs.flags(**({"save": save} | changes))) in (2, 4)
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error
    assert not save.exists() or {path.name for path in save.iterdir()} <= {"run_status.json"}


def test_processes_must_fit_the_sizes(runs: Runs, capfd, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(runs.flags(pipeline_model_parallel_size=4)) == 2
    assert "does not divide the 2 processes launched" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_layers": 8}, "num_layers"),
        ({"num_attention_heads": 8}, "num_attention_heads: checkpoint 4, flags 8"),
        ({"untie_exit_output_weights": True}, "exits.1.output.weight"),
        ({"exit_norm": "own"}, "exits.1.norm.weight"),
        ({"squared_relu": True}, "activation: checkpoint gelu_tanh, flags relu2"),
        ({"lr": 1e-3}, "--lr: checkpoint 0.002, now 0.001"),
        ({"optimizer": "sgd"}, "momentum_buffer"),
    ],
)
def test_checkpoint_of_another_model_or_schedule_is_refused(runs: Runs, capfd, changes, message) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, exit_interval=2)
    capfd.readouterr()
    assert main(runs.flags(load=save, **changes)) in (2, 4)
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


def test_schedule_flags_may_win_or_yield(runs: Runs) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, exit_interval=10)
    ours = steps(runs.train("a", load=save, lr=1e-3, **{"override_opt_param-scheduler": True}))
    theirs = steps(runs.train("b", load=save, lr=1e-3, **{"use_checkpoint_opt_param-scheduler": True}))
    straight = steps(runs.train("c"))
    assert [line["lr"] for line in theirs] == [line["lr"] for line in straight[10:]]
    assert ours[0]["lr"] < theirs[0]["lr"]


def test_exits_may_be_added_to_a_checkpoint_where_they_own_nothing(runs: Runs, capfd) -> None:
    save = runs.root / "save"
    runs.train("m", save=save, exit_interval=2, exit_layer_nums=None, exit_layer_weight=None)
    lines = steps(runs.train("n", load=save, finetune=True, train_iters=5))
    assert "loss/exit_3" in lines[0] and lines[0]["iteration"] == 1
    assert "exit_layer_nums" in capfd.readouterr().out


def test_wandb_gets_the_same_numbers(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict]] = []

    class Run:
        def log(self, values: dict, step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: Run() if settings["project"] == "exits" else None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    lines = steps(runs.train("m", wandb_project="exits", tracker_log_interval=10))
    by_step = {step: values for step, values in logged if "loss/final" in values}
    assert sorted(by_step) == [10, 20]
    assert by_step[20]["loss/exit_3"] == lines[-1]["loss/exit_3"]
    assert logged[-1] == (-1, {})


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_logging_service_that_fails_does_not_end_the_run(runs: Runs, monkeypatch, capfd, failing: str) -> None:
    class CommError(Exception):
        """wandb's own errors are no OSErrors."""

    def fail(*_: object, **__: object) -> None:
        raise CommError("the service is gone")

    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    setattr(run, failing, fail)
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert len(steps(runs.train("m", wandb_project="exits", tracker_log_interval=1))) == 20
    assert "WeightsAndBiases: the service is gone" in capfd.readouterr().out
    wandb.init = fail
    assert main(runs.flags(wandb_project="exits")) == 2
    assert "--wandb-project exits: the service is gone" in capfd.readouterr().err


def test_missing_logger_is_named_with_its_mend(runs: Runs, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(runs.flags(wandb_project="exits")) == 2
    assert "pip install 'ee-llm[log]'" in capfd.readouterr().err


@pytest.mark.slow
def test_compiled_layers_train_the_same(runs: Runs) -> None:
    plain = {"attention_dropout": 0, "hidden_dropout": 0, "train_iters": 6}
    for a, b in zip(steps(runs.train("a", **plain)), steps(runs.train("b", torch_compile=True, **plain)), strict=True):
        assert a["loss/final"] == pytest.approx(b["loss/final"], rel=1e-5)
