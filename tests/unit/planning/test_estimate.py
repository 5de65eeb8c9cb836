"""Predictions of steps: what is added up, what is extrapolated, what is refused."""

from dataclasses import replace

import pytest

from megatron.config.model import ExitConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.training import PrecisionConfig, TrainingConfig
from megatron.errors import ConfigError
from megatron.planning import estimate as module
from megatron.planning.device import Device
from megatron.planning.estimate import Setup, estimate, timeline_of
from megatron.schedule.actions import Op
from megatron.schedule.fill import most_fillers
from megatron.testing.tiny import model_config

DEVICE = Device("toy", 1e9, 1e9, 1e10, within=1e9, between=1e8, per_node=8)
NO_LINKS = replace(DEVICE, axes={"pp": 1e30, "tp": 1e30, "dp": 1e30}, memory_bandwidth=1e30)


def setup(world: int = 4, batch: int = 16, device: Device = DEVICE, layers: int = 8, **parallel: object) -> Setup:
    config = RunConfig(
        model=model_config("gpt", num_layers=layers),
        exits=ExitConfig(exit_layer_nums=(3,)),
        training=TrainingConfig(global_batch_size=batch),
        parallel=ParallelConfig(**{"pipeline_model_parallel_size": 4} | parallel),
        precision=PrecisionConfig(bf16=True),
    )
    return Setup(config, world, 64, device)


def test_one_process_does_everything_in_turn() -> None:
    one = setup(world=1, batch=4, device=NO_LINKS, pipeline_model_parallel_size=1)
    found = estimate(one)
    cost = one.costs([stage for stage in found.ranks[0].stages])[0]
    assert found.step == pytest.approx(4 * (cost.forward + cost.heads + cost.input + cost.weight))
    assert found.idle == pytest.approx(0) and found.reduction == pytest.approx(0)


@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "zb-h1", "interleaved"])
@pytest.mark.parametrize("layout", [None, "Et|t*3|tt|ttL"])
def test_long_steps_are_extrapolated_as_if_simulated(kind: str, layout: str | None, monkeypatch) -> None:
    flags: dict = {"pipeline_schedule": kind, "pipeline_model_parallel_layout": layout}
    if kind == "interleaved":
        flags["pipeline_model_parallel_layout"] = "Et|t|t|t|t|t|t|tL" if layout is None else "Et|tt|t|t|t|t|t|tL"
    for batch in (66, 103):
        job = setup(batch=batch, layers=9 if kind == "interleaved" and layout else 8, **flags)
        whole = estimate(job)
        monkeypatch.setattr(module, "LONG", 0)
        part = estimate(job)
        monkeypatch.undo()
        assert part.shown < batch == whole.shown
        assert part.forward_backward == pytest.approx(whole.forward_backward, rel=1e-3)
        assert [rank.memory for rank in part.ranks] == pytest.approx([rank.memory for rank in whole.ranks])


def test_a_part_has_the_fillers_of_the_whole_step(monkeypatch) -> None:
    job = setup(batch=64, fill_explicit_bubbles=True)
    whole = estimate(job)
    assert whole.shown == 64 and whole.fillers > 0
    monkeypatch.setattr(module, "LONG", 0)
    part = estimate(job)
    assert part.shown < 64 and part.config == whole.config and part.step == pytest.approx(whole.step)
    assert [rank.idle for rank in part.ranks] == pytest.approx([rank.idle for rank in whole.ranks])
    of_plan = replace(job, config=part.config)
    shown = timeline_of(of_plan, 12)
    last = {span.action.microbatch for span in shown.spans[3] if span.action.op is Op.FORWARD}
    warmup = part.config.parallel.num_fill_warmup_microbatches
    assert len(last) == 12 - warmup and warmup > 0, "the same number of fillers, also where few microbatches are shown"


def test_more_fillers_than_there_is_room_for_are_not_claimed() -> None:
    asked = setup(fill_explicit_bubbles=True, num_fill_warmup_microbatches=1, num_fill_cooldown_microbatches=9)
    assert estimate(asked).fillers <= 1 + most_fillers(4)


def test_data_parallel_ranks_split_the_batch_and_sum_gradients() -> None:
    alone, two = estimate(setup(batch=16)), estimate(setup(world=8, batch=16))
    assert (alone.microbatches, two.microbatches) == (16, 8)
    most = max(rank.parameters.total for rank in two.ranks)
    assert alone.reduction < two.reduction
    assert two.reduction - alone.reduction == pytest.approx(most * 8 / 2 / 1e9), "a ring sends 2 (n - 1)/n of 4 bytes"


def test_a_distributed_optimizer_takes_less_memory_and_a_shorter_update() -> None:
    whole, share = (estimate(setup(world=8, use_distributed_optimizer=flag)) for flag in (False, True))
    assert all(a.state.total < b.state.total for a, b in zip(share.ranks, whole.ranks, strict=True))
    assert share.update == pytest.approx(whole.update / 2)


def test_heads_where_ranks_wait_cost_nothing() -> None:
    """Before each backward they make the first stage the slowest; placed, they hide in its warm-up."""
    job = setup(batch=4, device=NO_LINKS)
    job = replace(job, config=replace(job.config, exits=ExitConfig(exit_layer_nums=(1, 2), use_exit_mlp=True)))
    placed = replace(job.config.parallel, exit_placement="planned")
    planned = replace(job, config=replace(job.config, parallel=placed))
    assert estimate(planned).forward_backward < estimate(job).forward_backward


def test_memory_says_what_fits() -> None:
    found = estimate(setup())
    assert found.fits(DEVICE) and not found.fits(replace(DEVICE, memory=found.memory - 1))


def test_what_does_not_divide_is_said() -> None:
    with pytest.raises(ConfigError, match="6 devices don't divide by tp=1 times pp=4"):
        estimate(setup(world=6))
    with pytest.raises(ConfigError, match="--global-batch-size 15 does not divide"):
        estimate(setup(world=8, batch=15))


def test_tuning_exits_keeps_no_backbone_for_a_backward_pass() -> None:
    """A quarter of the model, gradients and optimizer of the exits alone, and forward passes without backward ones."""
    job = setup(batch=4, device=NO_LINKS)
    exits = ExitConfig(exit_layer_nums=(1,), untie_exit_output_weights=True, exit_norm="own")
    parallel = ParallelConfig(tune_exit=True, pipeline_model_parallel_size=job.config.model.num_layers)
    tuned = replace(job, config=replace(job.config, exits=exits, parallel=parallel), world_size=1)
    full = replace(tuned, config=replace(tuned.config, parallel=ParallelConfig()))
    (rank,), (whole,) = estimate(tuned).ranks, estimate(full).ranks
    assert rank.parameters.layers * job.config.model.num_layers == whole.parameters.layers
    assert rank.state.gradients == 4 * rank.parameters.exits
    assert rank.state.optimizer <= 12 * rank.parameters.exits
    assert rank.activations < whole.activations / 4
    assert estimate(tuned).forward_backward < estimate(full).forward_backward / 3
