"""Matrix products in fp8 by NVIDIA's Transformer Engine, where it is installed: an optional extra.

Weights stay what they are; their products alone run in fp8, scaled by each tensor's own largest value, so that there is
no history of scales to save.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.nn.linear import ColumnParallelLinear, RowParallelLinear


def use_fp8(model: nn.Module, form: str) -> None:
    """Let the linear layers of `model` multiply in fp8. form: `e4m3`, or `hybrid` (e5m2 for gradients).

    Raises ConfigError where Transformer Engine is not installed.
    """
    try:
        import transformer_engine.pytorch as engine
        from transformer_engine.common.recipe import Float8CurrentScaling, Format
    except ImportError as error:
        raise ConfigError(
            "--fp8-format needs NVIDIA's Transformer Engine 2 or newer (pip install --no-build-isolation "
            f"'transformer-engine[pytorch]'), or leave it out: {error}"
        ) from error
    recipe = Float8CurrentScaling(fp8_format=Format[form.upper()])
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.product = _product(engine, recipe, module.weight)


def _product(engine: Any, recipe: Any, weight: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """x W^T in fp8; a closure, so that the layer's parameter is registered once."""
    rows, width = weight.shape
    linear = engine.Linear(width, rows, bias=False, params_dtype=weight.dtype, device="meta")
    linear.weight = weight

    def product(x: Tensor) -> Tensor:
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return linear(x)

    return product
