"""The optimizer against torch's own on the same numbers, in every number format, and when gradients are not finite."""

import math
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from megatron.config.training import OptimizerConfig
from megatron.errors import ConfigError
from megatron.optim.optimizer import TrainingOptimizer, is_decayed

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Two layers and a norm: matrices, biases, and a norm's weight."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 4] -> [n, 3]."""
        return self.second(self.norm(self.first(x)))


def optimizer_of(net: nn.Module, **changes) -> TrainingOptimizer:
    return TrainingOptimizer(net.named_parameters(), OptimizerConfig(**changes))


def data(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    """One microbatch's gradients."""
    x = data(seed, next(net.parameters()).dtype)
    (net(x).float().pow(2).mean() * scale).backward()


def snapshot(net: nn.Module, optimizer: TrainingOptimizer) -> dict[str, Tensor]:
    state = {f"{kind}/{name}": t.clone() for kind, name, t in optimizer.state_tensors()}
    return {**{name: p.detach().clone() for name, p in net.named_parameters()}, **state}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_only_matrices_decay():
    decayed = {name for name, p in Net().named_parameters() if is_decayed(name, p)}
    assert decayed == {"first.weight", "second.weight"}


def test_frozen_parameters_are_left_out():
    net = Net()
    net.first.requires_grad_(False)
    optimizer = optimizer_of(net)
    assert set(optimizer.parameters) == {"norm.weight", "norm.bias", "second.weight", "second.bias"}
    before = net.first.weight.clone()
    backward(net, 1)
    optimizer.step(0.1, 0.1, 1.0, True)
    assert torch.equal(net.first.weight, before)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_steps_are_those_of_torch(kind):
    """Three steps with decay in two groups and clipping, against torch's optimizer without any of our buffers."""
    ours, theirs = Net(torch.float64), Net(torch.float64)
    optimizer = optimizer_of(ours, optimizer=kind, clip_grad=0.3)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if is_decayed(n, p)], "weight_decay": 0.1},
        {"params": [p for n, p in theirs.named_parameters() if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    if kind == "adam":
        reference: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.999), eps=1e-8)
    else:
        reference = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        backward(ours, step)
        result = optimizer.step(0.05, 0.1, 1.0, True)
        reference.zero_grad()
        backward(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        reference.step()
        assert result.applied
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-12)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


def test_without_clipping_gradients_pass_whole():
    net = Net()
    optimizer = optimizer_of(net, clip_grad=0.0)
    backward(net, 1)
    before = [p.main_grad.clone() for p in net.parameters()]
    optimizer.step(0.1, 0.0, 1.0, True)
    assert all(torch.equal(p.main_grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_clipping_scales_to_the_limit():
    net = Net()
    optimizer = optimizer_of(net, clip_grad=0.01)
    backward(net, 1)
    norm = optimizer.step(0.1, 0.0, 1.0, True).grad_norm
    assert norm > 0.01
    clipped = float(nn.utils.get_total_norm([p.main_grad for p in net.parameters()]))
    assert clipped == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_their_own_masters(dtype):
    net = Net(dtype)
    optimizer = optimizer_of(net)
    assert all(optimizer.masters[name] is p for name, p in net.named_parameters())
    backward(net, 1)
    assert all(p.grad is p.main_grad and p.main_grad.dtype == dtype for p in net.parameters())
    assert {kind for kind, _, _ in optimizer.state_tensors()} == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_microbatches_add_up_in_fp32(dtype):
    """1 + 256 × 2^-9 is 1.5; summed in bf16 it would stay 1."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = TrainingOptimizer([("weight", weight)], OptimizerConfig())
    for gradient in [1.0, *[2.0**-9] * 256]:
        (weight * torch.tensor(gradient, dtype=dtype)).sum().backward()
    assert weight.main_grad.dtype == torch.float32
    assert weight.main_grad.item() == 1.5
    assert weight.grad is None
    optimizer.zero_grad()
    assert weight.main_grad.item() == 0.0


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_small_updates_are_kept_by_the_masters(dtype):
    """A thousand updates of 1e-5 move a weight of 1, though each is below what 16 bits resolve."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = TrainingOptimizer([("weight", weight)], OptimizerConfig(optimizer="sgd", sgd_momentum=0.0, clip_grad=0))
    for _ in range(1000):
        weight.main_grad.fill_(1.0)
        optimizer.step(1e-5, 0.0, 1.0, True)
    assert optimizer.masters["weight"].item() == pytest.approx(0.99, rel=1e-4)
    assert torch.equal(weight.detach(), optimizer.masters["weight"].detach().to(dtype))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_sixteen_bit_weights_are_rounded_masters(dtype):
    net = Net(dtype)
    optimizer = optimizer_of(net)
    for step in range(3):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step(0.01, 0.1, 1.0, True)
    for name, p in net.named_parameters():
        assert optimizer.masters[name].dtype == torch.float32
        assert torch.equal(p.detach(), optimizer.masters[name].detach().to(dtype))


def test_loss_scale_is_taken_out_again():
    plain, scaled = Net(), Net()
    results = []
    for net, scale in ((plain, 1.0), (scaled, 1024.0)):
        optimizer = optimizer_of(net, clip_grad=0.1)
        backward(net, 1, scale)
        results.append(optimizer.step(0.01, 0.1, scale, True))
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_change_no_bit(dtype, kind, poison):
    net = Net(dtype)
    optimizer = optimizer_of(net, optimizer=kind)
    backward(net, 0)
    optimizer.step(0.01, 0.1, 1.0, True)
    before, steps = snapshot(net, optimizer), optimizer.steps
    optimizer.zero_grad()
    backward(net, 1)
    net.second.weight.main_grad[0, 0] = poison
    result = optimizer.step(0.01, 0.1, 1.0, True)
    assert not result.applied
    assert not math.isfinite(result.grad_norm)
    assert_same_bits(snapshot(net, optimizer), before)
    assert optimizer.steps == steps


def test_without_the_check_a_non_finite_step_is_applied():
    net = Net()
    optimizer = optimizer_of(net, clip_grad=0.0)
    backward(net, 0)
    net.second.weight.main_grad[0, 0] = math.nan
    assert optimizer.step(0.01, 0.1, 1.0, False).applied
    assert torch.isnan(net.second.weight[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_restored_state_goes_on_bit_for_bit(dtype, kind):
    net = Net(dtype)
    optimizer = optimizer_of(net, optimizer=kind)

    def train(model: nn.Module, its_optimizer: TrainingOptimizer, steps: range) -> None:
        for step in steps:
            its_optimizer.zero_grad()
            backward(model, step)
            its_optimizer.step(0.01, 0.1, 1.0, True)

    train(net, optimizer, range(3))
    twin = Net(dtype)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    restored = optimizer_of(twin, optimizer=kind)
    saved = {(state, name): t.clone() for state, name, t in optimizer.state_tensors()}
    live = {(state, name): t for state, name, t in restored.state_tensors()}
    assert live.keys() == saved.keys()
    for key, tensor in live.items():
        tensor.copy_(saved[key])
    restored.steps = optimizer.steps
    train(net, optimizer, range(3, 6))
    train(twin, restored, range(3, 6))
    assert_same_bits(snapshot(twin, restored), snapshot(net, optimizer))


def test_state_has_its_shape_before_the_first_step():
    """So that a checkpoint of iteration 0 can be loaded like any other."""
    optimizer = optimizer_of(Net(torch.bfloat16))
    names = set(optimizer.parameters)
    found = {(kind, name) for kind, name, _ in optimizer.state_tensors()}
    assert found == {(kind, name) for kind in ("exp_avg", "exp_avg_sq", "master") for name in names}
    assert optimizer.steps == 0


def test_steps_are_counted_and_can_be_set():
    net = Net()
    optimizer = optimizer_of(net)
    backward(net, 1)
    optimizer.step(0.01, 0.0, 1.0, True)
    assert optimizer.steps == 1
    optimizer.steps = 41
    optimizer.step(0.01, 0.0, 1.0, True)
    assert optimizer.steps == 42
    assert optimizer_of(Net(), optimizer="sgd").steps == 0  # SGD counts none


def test_masters_follow_newly_loaded_weights():
    net = Net(torch.bfloat16)
    optimizer = optimizer_of(net)
    with torch.no_grad():
        net.first.weight.fill_(0.25)
    optimizer.reset_masters()
    assert torch.equal(optimizer.masters["first.weight"].detach(), torch.full((8, 4), 0.25))


def test_counts_zero_gradients_and_measures_weights():
    net = Net()
    optimizer = optimizer_of(net)
    count = sum(p.numel() for p in net.parameters())
    assert optimizer.num_zero_grads() == count
    net.first.weight.main_grad[0, 0] = 1.0
    assert optimizer.num_zero_grads() == count - 1
    assert optimizer.parameter_norm() == pytest.approx(
        math.sqrt(sum(float(p.detach().double().pow(2).sum()) for p in net.parameters())), rel=1e-6
    )


class FusedAdam(torch.optim.Optimizer):
    """apex's interface: moments by parameter, steps by group; the arithmetic is AdamW's."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - first)
                square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
                p.data.addcdiv_(mean, root, value=-group["lr"] / (1 - first**step))


def test_apex_is_used_where_asked_for_and_counts_its_steps(monkeypatch: pytest.MonkeyPatch):
    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")
    apex.optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex.optimizers)
    nets = Net(), Net()
    ours, theirs = optimizer_of(nets[0]), optimizer_of(nets[1], adam_implementation="apex")
    assert isinstance(theirs.inner, FusedAdam)
    for seed in range(3):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step(0.1, 0.01, 1.0, True)
    expected = snapshot(nets[0], ours)
    for name, tensor in snapshot(nets[1], theirs).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert (ours.steps, theirs.steps) == (3, 3)
    theirs.steps = 7
    assert theirs.steps == 7
    assert {group["step"] for group in theirs.inner.param_groups} == {7}


def test_apex_that_is_not_there_is_one_clear_line():
    with pytest.raises(ConfigError, match="needs NVIDIA's apex"):
        optimizer_of(Net(), adam_implementation="apex")
