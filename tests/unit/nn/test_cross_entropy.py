import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from megatron.nn import cross_entropy
from megatron.nn.cross_entropy import VocabShard, linear_cross_entropy


def example(n=37, h=8, v=50, dtype=torch.float64, seed=0):
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=source, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, h, generator=source, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, v, (n,), generator=source)
    counts = torch.rand(n, generator=source, dtype=torch.float64) * (torch.arange(n) % 5 != 0)
    return hidden, weight, labels, counts


def plain(hidden, weight, labels, counts, temperature, dynamic):
    """The same loss with all logits and autograd."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden @ weight.t() / temperature
    losses = F.cross_entropy(logits, labels, reduction="none")
    if dynamic:
        losses = losses * logits.softmax(-1).max(-1).values.detach()
    loss = (losses * counts).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("max_logits", [50, 50 * 7, 10**6])
def test_equals_plain_loss_and_gradients(temperature, dynamic, max_logits):
    hidden, weight, labels, counts = example()
    grad_weight = torch.ones_like(weight)
    ours = linear_cross_entropy(
        hidden, weight, labels, counts,
        temperature=temperature, dynamic=dynamic, grad_weight=grad_weight, grad_scale=0.3, max_logits=max_logits,
    )  # fmt: skip
    loss, d_hidden, d_weight = plain(hidden, weight, labels, counts, temperature, dynamic)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad_hidden, 0.3 * d_hidden, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(grad_weight, 1 + 0.3 * d_weight, rtol=1e-10, atol=1e-14)


def test_one_chunk_of_logits_is_alive_at_a_time(monkeypatch):
    hidden, weight, labels, counts = example()
    chunks, normalise = [], cross_entropy._normalise

    def watch(logits, *rest):
        assert all(chunk() is None for chunk in chunks)
        chunks.append(weakref.ref(logits))
        return normalise(logits, *rest)

    monkeypatch.setattr(cross_entropy, "_normalise", watch)
    linear_cross_entropy(hidden, weight, labels, counts, max_logits=50 * 7, grad_weight=torch.zeros_like(weight))
    assert len(chunks) == 6


def test_argmax_and_confidence():
    hidden, weight, labels, counts = example()
    ours = linear_cross_entropy(hidden, weight, labels, counts, dynamic=True, argmax_over=50, need_grad=False)
    probabilities = (hidden @ weight.t()).softmax(-1)
    assert torch.equal(ours.argmax, probabilities.argmax(-1))
    torch.testing.assert_close(ours.confidence, (probabilities.max(-1).values * counts).sum())
    assert ours.grad_hidden is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32_for_16_bit_inputs(dtype):
    """A bf16 running sum of thousands of losses would be off by percents."""
    hidden, weight, labels, _ = example(n=3000, dtype=dtype)
    counts = torch.full((3000,), 1 / 3000)
    ours = linear_cross_entropy(hidden, weight, labels, counts, max_logits=50 * 100)
    # The reference rounds its logits to 16 bits as the model's matrix product does, and sums in fp32.
    exact = F.cross_entropy((hidden @ weight.t()).float(), labels)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.loss, exact, rtol=1e-5, atol=0)
    assert ours.grad_hidden.dtype == dtype


def test_16_bit_gradients_accumulate_in_fp32():
    hidden, weight, labels, _ = example(dtype=torch.bfloat16)
    counts = torch.full((len(labels),), 1 / len(labels))
    buffer = torch.zeros(weight.shape)
    for _ in range(3):
        linear_cross_entropy(hidden, weight, labels, counts, grad_weight=buffer)
    _, _, once = plain(hidden.float(), weight.float(), labels, counts, 1.0, False)
    torch.testing.assert_close(buffer, 3 * once, rtol=0.05, atol=2e-3)


def test_frozen_output_matrix_gets_no_gradient():
    hidden, weight, labels, counts = example()
    ours = linear_cross_entropy(hidden, weight, labels, counts, grad_weight=None)
    _, d_hidden, _ = plain(hidden, weight, labels, counts, 1.0, False)
    torch.testing.assert_close(ours.grad_hidden, d_hidden)


def test_never_holds_all_logits(monkeypatch):
    hidden, weight, labels, counts = example(n=64)
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        out = matmul(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    linear_cross_entropy(hidden, weight, labels, counts, grad_weight=torch.zeros_like(weight), max_logits=50 * 8)
    assert 0 < largest <= 50 * 8


def _shard_worker(rank: int, world: int, rendezvous: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    hidden, weight, labels, counts = example()
    columns = weight.shape[0] // world
    mine = weight[rank * columns : (rank + 1) * columns].clone()
    grad_weight = torch.zeros_like(mine)
    ours = linear_cross_entropy(
        hidden, mine, labels, counts, temperature=0.7, dynamic=True, grad_weight=grad_weight, argmax_over=45,
        shard=VocabShard(rank * columns, dist.group.WORLD), max_logits=columns * 10,
    )  # fmt: skip
    dist.all_reduce(ours.grad_hidden)
    torch.save((ours.loss, ours.grad_hidden, grad_weight, ours.argmax), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_cut_over_two_ranks(tmp_path):
    mp.spawn(_shard_worker, args=(2, str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    hidden, weight, labels, counts = example()
    loss, d_hidden, d_weight = plain(hidden, weight, labels, counts, 0.7, True)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for part_loss, grad_hidden, _, argmax in parts:
        torch.testing.assert_close(part_loss, loss)
        torch.testing.assert_close(grad_hidden, d_hidden)
        assert torch.equal(argmax, (hidden @ weight.t())[:, :45].argmax(-1))
    torch.testing.assert_close(torch.cat([grad for _, _, grad, _ in parts]), d_weight)
