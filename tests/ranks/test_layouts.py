"""Losses and every gradient of one step are those of one process, in every layout (rows R3 and issue's equality)."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.config.run import RunConfig
from megatron.nn.linear import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.schedule.actions import Pipeline, ScheduleError
from megatron.schedule.simulate import Costs
from megatron.testing.layouts import VOCAB, assemble, build, one_step, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import random_batch
from megatron.train import build as build_module
from megatron.train import checkpoints
from megatron.train.plan import step_plan
from megatron.train.step import train_step

GPT = ""
LLAMA = (
    "--normalization RMSNorm --position-embedding-type rope --swiglu --ffn-hidden-size 48 --disable-bias-linear "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 4"
)
MODELS = {
    "no_exits": GPT,
    "tied": f"{GPT} --exit-layer-nums 1 3 --exit-layer-weight 0.25 0.5",
    "tied_norm": f"{GPT} --exit-layer-nums 2 4 --exit-layer-weight 0.25 0.5 --use-exit-norm",
    "final_norm": f"{GPT} --exit-layer-nums 1 3 --exit-layer-weight 0.25 0.5 --exit-norm final",
    "llama": f"{LLAMA} --exit-layer-nums 1 3 --exit-layer-weight 0.25 0.5 --untie-exit-output-weights",
    "llama_pre": f"{LLAMA} --exit-layer-nums 1 3 --exit-layer-weight 0.3 0.7 --pre-exit --qk-layernorm",
    "mlp": f"{LLAMA} --exit-layer-nums 2 3 --exit-layer-weight 0.3 0.7 --use-exit-mlp --use-exit-norm",
    "block": f"{GPT} --exit-layer-nums 2 4 --exit-layer-weight 0.3 0.7 --use-exit-block --untie-exit-output-weights",
    "per_token": f"{GPT} --exit-layer-nums 1 3 --exit-layer-weight 0.3 0.7 --calculate-per-token-loss",
    "dynamic": f"{GPT} --exit-layer-nums 1 3 --exit-layer-weight 0.3 0.7 --use-dynamic-exit-layer-weight",
}
LAYOUTS = {
    "tp2": {"tp": 2}, "tp4": {"tp": 4}, "pp2": {"pp": 2}, "pp4": {"pp": 4}, "dp2": {"dp": 2}, "dp4": {"dp": 4},
    "tp2pp2": {"tp": 2, "pp": 2}, "tp2dp2": {"tp": 2, "dp": 2}, "pp2dp2": {"pp": 2, "dp": 2},
    "tp2pp2dp2": {"tp": 2, "pp": 2, "dp": 2},
}  # fmt: skip

EIGHT = {
    "tp8": {"tp": 8}, "pp8": {"pp": 8}, "dp8": {"dp": 8}, "tp4pp2": {"tp": 4, "pp": 2}, "tp2pp4": {"tp": 2, "pp": 4},
    "tp4dp2": {"tp": 4, "dp": 2}, "tp2dp4": {"tp": 2, "dp": 4}, "pp4dp2": {"pp": 4, "dp": 2},
    "pp2dp4": {"pp": 2, "dp": 4},
}  # fmt: skip
DEEP = "--num-layers 8 --num-attention-heads 8"


def product(models: Iterable[str], layouts: Iterable[str], each: int = 2) -> list:
    """All pairs; `each` of every model's, such that every layout occurs too, are in the quick tier."""
    layouts, pairs = list(layouts), []
    for i, model in enumerate(models):
        quick = {(i + k * (len(layouts) // each)) % len(layouts) for k in range(each)}
        pairs += [
            pytest.param(model, layout, marks=() if j in quick else pytest.mark.slow)
            for j, layout in enumerate(layouts)
        ]
    return pairs


def compare(
    ranks: Ranks, flags: str, layout: dict[str, int], more: str = "", dtype: torch.dtype = torch.float64
) -> None:
    """`more`: flags that one process has no use for. The state after a step is compared in float64 alone."""
    config = toy_config(*flags.split(), *more.split())
    plain = toy_config(*flags.split())
    alone = one_step(ONE_RANK, plain, dtype)
    answers = ranks.run(one_step, config, dtype, **layout)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    for answer in answers:
        assert answer["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        assert answer["grad_norm"] == pytest.approx(alone["grad_norm"], rel=tolerance)
    for what in ("gradients", "after") if dtype is torch.float64 else ("gradients",):
        expected, found = assemble([alone], what), assemble(answers, what)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            # Adam divides by the root of tiny squares: what differs by rounding there is magnified
            slack = 1.0 if what == "gradients" else 1e3
            torch.testing.assert_close(found[name], tensor, rtol=slack * tolerance, atol=slack * tolerance, msg=name)


@pytest.mark.parametrize(("model", "layout"), product(MODELS, LAYOUTS))
def test_a_step_is_that_of_one_process(ranks: Ranks, model: str, layout: str) -> None:
    compare(ranks, MODELS[model], LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT)
@pytest.mark.parametrize("model", MODELS)
def test_eight_ranks(ranks: Ranks, model: str, layout: str) -> None:
    groups = "--num-query-groups 8" if "llama" in model or model == "mlp" else ""
    compare(ranks, f"{MODELS[model]} {DEEP} {groups}", EIGHT[layout])


@pytest.mark.parametrize(("model", "layout"), product(["tied", "llama_pre", "mlp", "block"], LAYOUTS, each=1))
def test_in_single_precision(ranks: Ranks, model: str, layout: str) -> None:
    compare(ranks, MODELS[model], LAYOUTS[layout], dtype=torch.float32)


@pytest.mark.parametrize(("model", "layout"), product(MODELS, ["tp2", "tp4", "tp2pp2", "tp2pp2dp2"], each=1))
def test_with_sequence_parallelism(ranks: Ranks, model: str, layout: str) -> None:
    compare(ranks, MODELS[model], LAYOUTS[layout], "--sequence-parallel")


SCHEDULES = {
    "gpipe": "--pipeline-schedule gpipe",
    "interleaved": "--num-layers-per-virtual-pipeline-stage 1",
    "zb-h1": "--pipeline-schedule zb-h1",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("model", "layout"),
    product(MODELS, ["pp2", "tp2pp2", "pp2dp2", "tp2pp2dp2"], each=1),
)
def test_every_schedule(ranks: Ranks, model: str, layout: str, schedule: str) -> None:
    compare(ranks, MODELS[model], LAYOUTS[layout], SCHEDULES[schedule])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["tp2pp2", "tp2pp2dp2"])
@pytest.mark.parametrize("model", MODELS)
def test_every_schedule_with_sequence_parallelism(ranks: Ranks, model: str, layout: str, schedule: str) -> None:
    compare(ranks, MODELS[model], LAYOUTS[layout], f"{SCHEDULES[schedule]} --sequence-parallel")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["pp4", "pp8", "tp2pp4", "pp4dp2"])
@pytest.mark.parametrize("model", ["tied_norm", "final_norm", "block"])
def test_every_schedule_on_more_stages(ranks: Ranks, model: str, layout: str, schedule: str) -> None:
    if (layout, schedule) == ("pp8", "interleaved"):
        pytest.skip("eight layers are one stage a rank")
    compare(ranks, f"{MODELS[model]} {DEEP}", (LAYOUTS | EIGHT)[layout], SCHEDULES[schedule])


@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("tied", ""),
        pytest.param("block", "--num-layers-per-virtual-pipeline-stage 1", marks=pytest.mark.slow),
        pytest.param("mlp", "--pipeline-schedule zb-h1", marks=pytest.mark.slow),
    ],
)
def test_exit_heads_where_their_stage_waits(ranks: Ranks, model: str, schedule: str) -> None:
    compare(ranks, MODELS[model], {"pp": 2, "tp": 2}, f"--exit-placement planned {schedule}")


BY_HAND = """\
0F0,0F1,0F2,0E1,0E0,0E2,0I0,0I1,0W1,0W0,0B2,0F3,0F4,0E3,0B3,0E4,0B4,0F5,0E5,0B5,0F6,0F7,0E7,0E6,0B6,0B7
1F0,1E0,1F1,1B0,1E1,1F2,1I1,1E2,1W1,1B2,1F3,1E3,1B3,1F4,1E4,1B4,1F5,1E5,1B5,1F6,1E6,1B6,1F7,1E7,1B7
"""


def test_a_schedule_written_by_hand(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text(BY_HAND)
    compare(ranks, MODELS["tied_norm"], {"pp": 2}, f"--schedule-file {tmp_path}/steps.csv")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BY_HAND.replace("1W1,", ""), "action 1W1 is missing"),
        (BY_HAND.replace("0F0,", "0F0,0G0,"), "line 1, word 2: '0G0' is not an action"),
        (BY_HAND.replace("7", "8"), "beyond the step's 8 microbatches"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_schedule_is_refused_before_any_work(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "steps.csv"
    if text is not None:
        path.write_text(text)
    flags = toy_config("--pipeline-model-parallel-size", "2", "--schedule-file", str(path))
    with pytest.raises(ScheduleError) as error:
        step_plan(flags.parallel, Pipeline(2, 8, frozenset((0, 1))), (Costs(), Costs()))
    assert complaint in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-h1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("mlp", "Et|t*3L"),
        ("tied", "E|t*4L"),
        pytest.param("final_norm", "Et*4|L", marks=pytest.mark.slow),
        pytest.param("block", "Et*3|tL", marks=pytest.mark.slow),
    ],
)
def test_stages_of_unequal_depth(ranks: Ranks, model: str, stages: str, schedule: str) -> None:
    layout = f"--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout {stages}"
    compare(ranks, MODELS[model], {"pp": 2}, f"{layout} --pipeline-schedule {schedule}")


def test_chunks_of_unequal_depth(ranks: Ranks) -> None:
    layout = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|t*2|t|tL"
    compare(ranks, MODELS["tied"], {"pp": 2}, layout)


@pytest.mark.parametrize(
    ("model", "layout"),
    product(["tied", "final_norm", "llama_pre"], ["dp2", "dp4", "tp2dp2", "pp2dp2", "tp2pp2dp2"]),
)
def test_a_sharded_optimizer(ranks: Ranks, model: str, layout: str) -> None:
    compare(ranks, MODELS[model], LAYOUTS[layout], "--use-distributed-optimizer")


def test_dropout_is_the_same_for_any_number_of_pipeline_and_data_parallel_ranks(ranks: Ranks) -> None:
    compare(ranks, f"{MODELS['tied_norm']} --hidden-dropout 0.3 --attention-dropout 0.2", {"dp": 2, "pp": 2})


def elements_written(mesh: Mesh, config: RunConfig) -> tuple[int, int]:
    """Elements that this rank writes to a checkpoint, and that it holds."""
    trainer = build(mesh, config, torch.float32)
    written, held = checkpoints.tensors_to_save(trainer), checkpoints.state_tensors(trainer)
    return tuple(sum(part.view.numel() for part in parts.values()) for parts in (written, held))


@pytest.mark.parametrize("more", ["", "--use-distributed-optimizer"])
def test_data_parallel_ranks_share_out_what_they_all_hold(ranks: Ranks, more: str) -> None:
    config = toy_config(*MODELS["tied"].split(), *more.split())
    answers = ranks.run(elements_written, config, dp=2)
    (_, alone), whole = elements_written(ONE_RANK, config), sum(written for written, _ in answers)
    assert whole == alone
    assert max(written for written, _ in answers) < 0.6 * whole


def state_elements(mesh: Mesh, config: RunConfig) -> tuple[int, int]:
    """Elements of optimizer state on this rank, and of parameters."""
    trainer = build(mesh, config, torch.float32)
    state = sum(tensor.numel() for _, _, tensor in trainer.optimizer.state_tensors())
    return state, sum(parameter.numel() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("dp", [2, 4])
def test_a_sharded_optimizer_keeps_its_share_of_the_state(ranks: Ranks, dp: int) -> None:
    config = toy_config(*MODELS["tied"].split(), "--use-distributed-optimizer")
    for state, parameters in ranks.run(state_elements, config, dp=dp):
        assert state <= 1.05 * 2 * parameters / dp


def tied_matrix(mesh: Mesh, config: RunConfig) -> torch.Tensor:
    """This stage's copy of the word embedding after a few steps."""
    trainer = build(mesh, config, torch.float32)
    for step in range(3):
        batches = [random_batch(1, 16, VOCAB, seed=9 * step + 3 * m + mesh.rank("dp")) for m in range(2)]
        train_step(trainer, batches)
    return trainer.model.output_weight(trainer.model.head_labels()[-1]).detach()


@pytest.mark.parametrize("more", ["", "--use-distributed-optimizer"])
def test_copies_of_a_tied_matrix_stay_equal_to_the_bit(ranks: Ranks, more: str) -> None:
    """Three terms: the order in which they are added makes a difference."""
    config = toy_config(*MODELS["tied"].split(), *more.split(), "--global-batch-size", "6")
    first, *others = ranks.run(tied_matrix, config, dp=3, pp=2)
    assert all(torch.equal(first, other) for other in others)


def step_with_other_products(mesh: Mesh, config: RunConfig) -> dict:
    """`one_step` with products of layers made apart, as fp8 kernels make them: here exact ones."""

    def divert(model: torch.nn.Module, _form: str) -> None:
        for module in model.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.product = partial(torch.nn.functional.linear, weight=module.weight)

    inner, build_module.use_fp8 = build_module.use_fp8, divert
    precision = replace(config.precision, fp8="hybrid")
    try:
        return one_step(mesh, replace(config, precision=precision), torch.float64)
    finally:
        build_module.use_fp8 = inner


@pytest.mark.parametrize("flags", ["", "--sequence-parallel"])
def test_products_of_another_kernel_meet_the_same_regions(ranks: Ranks, flags: str) -> None:
    config = toy_config(*MODELS["mlp"].split())
    alone = assemble([one_step(ONE_RANK, config, torch.float64)])
    answers = ranks.run(step_with_other_products, toy_config(*MODELS["mlp"].split(), *flags.split()), tp=2)
    for name, tensor in assemble(answers).items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-10, atol=1e-10, msg=name)
