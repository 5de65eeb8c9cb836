"""State of training against an optimizer that was built, and what heads need against what they take."""

import pytest
import torch

from megatron.config.model import ExitConfig
from megatron.config.training import OptimizerConfig, TrainingConfig
from megatron.exits.spec import exit_specs
from megatron.model.gpt import GPT
from megatron.model.partition import partition
from megatron.optim import buckets, gradient_sync
from megatron.optim.optimizer import TrainingOptimizer
from megatron.planning.activations import Activations
from megatron.planning.costs import stage_costs
from megatron.planning.memory import BUCKET, UNDER_WAY, training_state, with_memory
from megatron.planning.parameters import rank_parameters
from megatron.schedule.actions import Pipeline
from megatron.schedule.generate import gpipe, one_f_one_b
from megatron.schedule.simulate import peak_memory
from megatron.testing.tiny import model_config

VOCAB = 64
EXITS = ExitConfig(exit_layer_nums=(2,), exit_norm="own")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_what_the_optimizer_makes(dtype: torch.dtype, optimizer: str) -> None:
    model, stages = model_config("llama"), partition((4,), exit_specs(EXITS))
    gpt = GPT(model, EXITS, stages, VOCAB).to(dtype)
    made = TrainingOptimizer(gpt.named_parameters(), OptimizerConfig(optimizer=optimizer))
    state = training_state(
        rank_parameters(model, EXITS, stages, VOCAB), dtype.itemsize, 1, sharded=False, adam=optimizer == "adam"
    )
    assert state.weights == sum(p.nbytes for p in gpt.parameters())
    assert state.gradients == sum(p.main_grad.nbytes for p in gpt.parameters())
    assert state.optimizer == sum(tensor.nbytes for _, _, tensor in made.state_tensors())


def test_a_sharded_optimizer_keeps_its_share() -> None:
    parameters = rank_parameters(model_config(), EXITS, partition((4,), exit_specs(EXITS)), VOCAB)
    whole, share = (training_state(parameters, 2, 4, sharded) for sharded in (False, True))
    assert share.optimizer == pytest.approx(whole.optimizer / 4, abs=12)
    assert (share.weights, share.gradients) == (whole.weights, whole.gradients)


def test_buckets_are_those_of_the_optimizer() -> None:
    assert (BUCKET, UNDER_WAY) == (buckets.BUCKET, gradient_sync._MOST_FLYING + 1)


def test_peaks_follow_the_schedule() -> None:
    """1F1B holds as many microbatches on the first stage as there are stages, GPipe all of them."""
    model, stages, training = model_config(), partition((2, 2), exit_specs(EXITS)), TrainingConfig()
    activations = Activations(model, VOCAB, 1, elements=4, kind="cpu")
    costs = with_memory(stage_costs(model, EXITS, stages, VOCAB, 16), activations, EXITS, stages, training)
    pipeline = Pipeline(2, 6, frozenset({0, 1}))
    few, many = (peak_memory(made(pipeline), costs) for made in (one_f_one_b, gpipe))
    assert many[0] - few[0] == pytest.approx(4 * costs[0].kept)
    assert few[0] >= 2 * costs[0].kept + max(costs[0].heads_peak, costs[0].heads_kept + costs[0].backward_peak)
