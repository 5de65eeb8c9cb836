import pytest
import torch
import torch.nn.functional as F

from megatron.config.model import ModelConfig
from megatron.nn.mlp import MLP


def gated(dtype: torch.dtype) -> MLP:
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=12, num_attention_heads=1, seq_length=4, swiglu=True,
        add_bias_linear=False,
    )  # fmt: skip
    mlp = MLP(config).to(dtype)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
        parameter.main_grad = None
    return mlp


def plain(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, mlp.up.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, mlp.down.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_swiglu_is_bit_for_bit_that_of_autograd(dtype: torch.dtype) -> None:
    mlp = gated(dtype)
    x = torch.randn(3, 2, 8, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 2, 8, dtype=dtype)
    wanted = (x, mlp.up.weight, mlp.down.weight)
    ours, theirs = ([out, *torch.autograd.grad(out, wanted, upstream)] for out in (mlp(x), plain(mlp, x)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_inference_gives_the_same() -> None:
    mlp = gated(torch.float32)
    x = torch.randn(3, 2, 8)
    trained = mlp(x)
    with torch.inference_mode():
        assert torch.equal(mlp(x), trained)
