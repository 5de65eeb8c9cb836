"""The update rules: torch's AdamW and SGD, and FusedAdam of NVIDIA's apex where it is installed and asked for.

Their state is made before the first step, so that checkpoints have one shape from the start.
"""

import torch
from torch import nn

from megatron.config.training import OptimizerConfig
from megatron.errors import ConfigError


def build_update(config: OptimizerConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters, with its state. Raises ConfigError where it is not installed."""
    if config.optimizer == "sgd":
        made = torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, fused=True)
    else:
        betas = (config.adam_beta1, config.adam_beta2)
        if config.adam_implementation == "apex":
            made = _apex_adam()(groups, lr=0.0, betas=betas, eps=config.adam_eps, adam_w_mode=True)
        else:
            made = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=True)
    for group in made.param_groups:
        for parameter in group["params"]:
            made.state[parameter] = _state(made, parameter)
    return made


def applied_steps(update: torch.optim.Optimizer) -> int:
    """Updates so far, as Adam counts them: torch's by parameter, apex's by group; 0 for SGD."""
    counts = (kept.get("step") for kept in (*update.state.values(), *update.param_groups))
    return int(next((step for step in counts if step is not None), 0))


def set_applied_steps(update: torch.optim.Optimizer, value: int) -> None:
    """Set what `applied_steps` tells."""
    if isinstance(update, torch.optim.SGD):
        return
    for state in update.state.values():
        if "step" in state:
            state["step"].fill_(value)
    if not isinstance(update, torch.optim.AdamW):
        for group in update.param_groups:
            group["step"] = value


def _state(update: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What the first step would make."""
    if isinstance(update, torch.optim.SGD):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    if not isinstance(update, torch.optim.AdamW):
        return moments
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


def _apex_adam() -> type[torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            "--adam-implementation apex needs NVIDIA's apex (github.com/NVIDIA/apex, not PyPI's package of that name); "
            f"torch's own AdamW is fused, too: {error}"
        ) from error
    return FusedAdam
