"""The optimizer over a model's parameters: gradient buffers, fp32 masters, decay groups, clipping, the update.

Every trainable parameter has `main_grad`, a buffer of at least fp32 that all microbatches add into: autograd
through a hook (or directly, where the dtypes agree), vocabulary heads in `nn.cross_entropy`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from megatron.config.training import OptimizerConfig
from megatron.optim.gradient_sync import GradientSync, Shared
from megatron.optim.updates import applied_steps, build_update, set_applied_steps
from megatron.parallel.mesh import ONE_RANK, Mesh


@dataclass(frozen=True)
class StepResult:
    """applied: whether parameters changed. grad_norm: global L2 norm before clipping, loss scale removed."""

    applied: bool
    grad_norm: float


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices: not for biases and norm weights."""
    return parameter.dim() > 1 and not name.endswith(".bias")


class TrainingOptimizer:
    """AdamW or SGD on fp32 (or wider) weights; 16-bit parameters are copies of fp32 masters."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        mesh: Mesh | None = None,
        shared: Shared | None = None,
        sharded: bool = False,
    ) -> None:
        """mesh, shared: where the model is spread over ranks, and what they have in common. sharded: each
        data-parallel rank updates, and keeps state for, its rows of every parameter alone."""
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.sync = GradientSync(mesh or ONE_RANK, self.parameters, shared or Shared(), sharded)
        self.clip_grad = config.clip_grad
        self.masters = {name: _master(p, self.sync) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            _attach_gradient_buffer(p, partial(_tell, WeakMethod(self.sync.made), name) if self.sync.overlaps else None)
        self.sync.make_buckets()
        for name, p in self.parameters.items():
            self.masters[name].grad = self.sync.own(p.main_grad)
        groups = [
            {
                "params": [m for n, m in self.masters.items() if is_decayed(n, m) is decayed],
                "decayed": decayed,
            }
            for decayed in (True, False)
        ]
        self.inner = build_update(config, [group for group in groups if group["params"]] or groups[:1])

    def zero_grad(self) -> None:
        """Clear all gradient buffers in place."""
        if self.parameters:  # a stage without exits has none where these alone train
            torch._foreach_zero_([p.main_grad for p in self.parameters.values()])

    def step(
        self, lr: float, weight_decay: float, loss_scale: float, check_finite: bool, limit: float | None = None
    ) -> StepResult:
        """Unscale, measure, clip and apply the accumulated gradients, which `sync.finish` has made whole.

        A gradient norm that is not finite (with `check_finite`) or above `limit` leaves parameters and moments
        untouched.
        """
        norm = self.sync.total_norm() / loss_scale
        if (check_finite and not math.isfinite(norm)) or (limit is not None and norm > limit):
            return StepResult(False, norm)
        factor = 1.0 / loss_scale
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (norm + 1e-6))
        if factor != 1.0 and self.masters:
            torch._foreach_mul_([master.grad for master in self.masters.values()], factor)
        for group in self.inner.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        self.inner.step()
        self._refresh_parameters()
        self.sync.hand_out()
        return StepResult(True, norm)

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters whose accumulated gradient is not finite."""
        return [name for name, p in self.parameters.items() if not bool(p.main_grad.isfinite().all())]

    def steepest_parameter(self) -> tuple[float, str]:
        """Norm of the largest gradient of a parameter (of this rank's rows of it), and the parameter's name."""
        if not self.masters:
            return 0.0, "nothing"
        norms = torch.stack(torch._foreach_norm([master.grad for master in self.masters.values()]))
        place = int(norms.argmax())
        return float(norms[place]), list(self.masters)[place]

    def num_zero_grads(self) -> int:
        """How many gradient entries are exactly zero."""
        return self.sync.count_zeros()

    def parameter_norm(self) -> float:
        """Global L2 norm of the trained parameters."""
        return self.sync.parameter_norm(self.masters)

    def _refresh_parameters(self) -> None:
        """Round the masters into the 16-bit parameters."""
        pairs = [(self.sync.own(p.detach()), self.masters[n]) for n, p in self._copied()]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in pairs], [master for _, master in pairs])

    def state_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, parameter name, tensor) for all state a checkpoint needs, as live tensors; see `first_row`."""
        for name, master in self.masters.items():
            for kind, value in self.inner.state[master].items():
                if kind != "step":
                    yield kind, name, value
        for name, _ in self._copied():
            yield "master", name, self.masters[name].detach()

    def first_row(self, name: str) -> int:
        """From which row of the parameter on this rank has state."""
        return self.sync.first_row(self.parameters[name])

    def _copied(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters whose masters are copies of their own."""
        return [(name, p) for name, p in self.parameters.items() if self.masters[name].dtype != p.dtype]

    @property
    def steps(self) -> int:
        """Updates applied so far, as Adam counts them."""
        return applied_steps(self.inner)

    @steps.setter
    def steps(self, value: int) -> None:
        set_applied_steps(self.inner, value)

    def reset_masters(self) -> None:
        """Take masters anew from the parameters, after weights were loaded without optimizer state."""
        with torch.no_grad():
            for name, p in self._copied():
                self.masters[name].copy_(self.sync.own(p))


def _master(parameter: nn.Parameter, sync: GradientSync) -> nn.Parameter:
    """The tensor the update works on: the parameter (or this rank's rows of it) itself, or an fp32 copy of a 16-bit
    one."""
    if parameter.dtype in (torch.float16, torch.bfloat16):
        return nn.Parameter(sync.own(parameter.detach()).float())
    return nn.Parameter(sync.own(parameter.detach())) if sync.sharded else parameter


def _tell(listener: WeakMethod, name: str) -> None:
    """Call the listener with a parameter's name; a hook that held it would keep itself, and all groups, alive."""
    method = listener()
    if method is not None:
        method(name)


def _attach_gradient_buffer(parameter: nn.Parameter, made: Callable[[], None] | None) -> None:
    """Give the parameter its `main_grad`, which backward passes add to; each then calls `made`."""
    precise = torch.promote_types(torch.float32, parameter.dtype)
    parameter.main_grad = torch.zeros_like(parameter, dtype=precise)
    adds_in_place = precise == parameter.dtype
    if adds_in_place:
        parameter.grad = parameter.main_grad

    def added(p: nn.Parameter) -> None:
        if not adds_in_place and p.grad is not None:  # a split backward pass adds the matrices' later
            p.main_grad.add_(p.grad)
            p.grad = None
        if made is not None:
            made()

    if made is not None or not adds_in_place:
        parameter.register_post_accumulate_grad_hook(added)
