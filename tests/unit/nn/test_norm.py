import pytest
import torch
import torch.nn.functional as F

from megatron.nn.norm import Norm, rms_norm


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=dtype, generator=generator) * 3
    weight = torch.randn(shape[-1], dtype=dtype, generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4), (2, 3, 2, 4), (1, 1, 7)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), inputs(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_same_as_torch(dtype: torch.dtype, transposed: bool) -> None:
    x, weight = inputs((6, 3, 64), dtype)
    seen = x.transpose(0, 1) if transposed else x
    upstream = torch.randn(seen.shape, dtype=dtype)
    results = [f(seen, weight) for f in (lambda a, b: rms_norm(a, b, 1e-6), lambda a, b: F.rms_norm(a, (64,), b, 1e-6))]
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 0.0}[dtype]
    ours, theirs = ([out, *torch.autograd.grad(out, (x, weight), upstream)] for out in results)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * 20)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    tensors = inputs((4, 8))
    tensors[frozen].requires_grad_(False)
    rms_norm(*tensors, 1e-5).sum().backward()
    assert tensors[frozen].grad is None and tensors[1 - frozen].grad is not None


def test_zero_centered_weights_count_from_one() -> None:
    norm = Norm(8, "RMSNorm", 1e-5, zero_centered=True)
    torch.nn.init.zeros_(norm.weight)
    x = torch.randn(3, 8)
    assert torch.allclose(norm(x), F.rms_norm(x, (8,), eps=1e-5), atol=1e-6)


def test_inference_and_training_agree() -> None:
    x, weight = inputs((4, 32), torch.float32)
    trained = rms_norm(x, weight, 1e-6)
    with torch.inference_mode():
        assert torch.allclose(rms_norm(x, weight, 1e-6), trained, rtol=1e-6, atol=1e-6)
