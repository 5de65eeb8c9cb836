"""The search among layouts: what it finds fits, divides and is fastest; what it can't find it explains."""

import time
from dataclasses import replace

import pytest

from megatron.config.load import load
from megatron.config.rules import broken
from megatron.errors import ConfigError
from megatron.planning.device import overruled, preset
from megatron.planning.estimate import Setup, estimate
from megatron.planning.report import flags
from megatron.planning.search import Space, describe, nearest_recompute, search

LLAMA_7B = """--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008 --swiglu
    --normalization RMSNorm --disable-bias-linear --use-rotary-position-embeddings
    --untie-embeddings-and-output-weights --untie-exit-output-weights --exit-layer-nums 9 17 --pre-exit
    --seq-length 2048 --micro-batch-size 2 --bf16"""
ROWS = 32000


def setup(flags: str = "", gpus: int = 16, batch: int = 256, device: str = "A100-80GB") -> Setup:
    words = [*LLAMA_7B.split(), "--global-batch-size", str(batch), *flags.split()]
    return Setup(load(words).config, gpus, ROWS, preset(device, "bfloat16"))


def test_what_is_found_fits_can_be_run_and_is_sorted() -> None:
    job = setup()
    found = search(job, Space(micro_batches=(2,)))
    assert found.judged > 50 and len(found.best) == 5
    assert [one.step for one in found.best] == sorted(one.step for one in found.best)
    for one in found.best:
        assert one.fits(job.device) and not broken(one.config), describe(one)
        again = estimate(replace(job, config=one.config))
        assert again.step == one.step
    given = estimate(setup("--pipeline-model-parallel-size 4"))
    assert found.best[0].step <= given.step, "the layout of the example script is one of those that were judged"


def test_only_what_may_be_chosen_is() -> None:
    found = search(setup(), Space(("gpipe", "1f1b"), tp=(2,), pp=(4,), micro_batches=(1,), recompute=("full",)))
    for one in found.best:
        parallel, training = one.config.parallel, one.config.training
        assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 4)
        assert parallel.pipeline_schedule in ("gpipe", "1f1b")
        assert (training.micro_batch_size, training.recompute_granularity) == (1, "full")


def test_small_memory_asks_for_recompute() -> None:
    large = setup(gpus=4, batch=64)
    small = replace(large, device=overruled(large.device, {"memory": 40e9}))
    space = Space(("1f1b",), pp=(4,), tp=(1,), micro_batches=(2,))
    roomy, tight = search(large, space).best[0], search(small, space).best[0]
    assert roomy.config.training.recompute_granularity is None
    assert tight.config.training.recompute_granularity == "full" and tight.memory < 40e9 < roomy.memory
    as_given = replace(small, config=roomy.config)
    assert nearest_recompute(as_given) == "full"
    assert nearest_recompute(replace(as_given, device=overruled(small.device, {"memory": 1e9}))) is None


def test_balanced_stages_beat_equal_ones() -> None:
    """Both exits on the first of four stages, and a large vocabulary."""
    job = setup("--exit-layer-nums 3 6", gpus=4, batch=64)
    job = replace(job, rows=128000)
    best = search(job, Space(("1f1b",), tp=(1,), pp=(4,), micro_batches=(1,))).best[0]
    assert best.config.parallel.pipeline_model_parallel_layout is not None
    equal = replace(best.config.parallel, pipeline_model_parallel_layout=None)
    assert best.step < estimate(replace(job, config=replace(best.config, parallel=equal))).step


def test_stages_are_balanced_within_their_memory() -> None:
    """Where the fastest division overflows a stage, layers move to where there is room."""
    job = replace(setup("--exit-layer-nums 3 6", gpus=4, batch=64), rows=128000)
    space = Space(("1f1b",), tp=(1,), pp=(4,), micro_batches=(1,), recompute=("none",))
    free = search(job, space).best[0]
    tight = replace(job, device=overruled(job.device, {"memory": free.memory - 1e9}))
    found = search(tight, space).best[0]
    assert found.fits(tight.device) and found.step >= free.step
    assert found.config.parallel.pipeline_model_parallel_layout != free.config.parallel.pipeline_model_parallel_layout


def test_filling_is_there_if_asked_for() -> None:
    space = Space(("1f1b+fill",), tp=(1,), pp=(4,), micro_batches=(2,))
    best = search(setup(gpus=4, batch=32), space).best[0]
    parallel = best.config.parallel
    counts = parallel.num_fill_warmup_microbatches, parallel.num_fill_cooldown_microbatches
    assert parallel.fill_explicit_bubbles and sum(counts) == best.fillers > 0
    assert "1f1b+fill ({} warm-up and {} cool-down fillers)".format(*counts) in describe(best)
    assert f"--num-fill-warmup-microbatches {counts[0]}" in " ".join(flags(best))


def test_filled_steps_are_compared_by_their_full_microbatches() -> None:
    """Fillers make the step shorter than one of full microbatches alone, and train less: that is not faster."""
    space = Space(("1f1b", "1f1b+fill"), tp=(1,), pp=(4,), micro_batches=(2,), recompute=("none",))
    found = search(setup(gpus=4, batch=32), space)
    plain, filled = (found.kinds[schedule, "equal"] for schedule in ("1f1b", "1f1b+fill"))
    assert filled.step < plain.step and filled.tokens == plain.tokens == 32 * 2048
    assert filled.tokens_per_second == pytest.approx((16 - filled.fillers) / 16 * filled.tokens / filled.step)
    assert filled.tokens_per_second < plain.tokens_per_second
    assert not found.best[0].config.parallel.fill_explicit_bubbles


def test_losing_kinds_are_kept() -> None:
    job = setup("--exit-layer-nums 3 6", gpus=4, batch=64)
    job = replace(job, rows=128000, device=overruled(job.device, {"memory": 50e9}))
    found = search(job, Space(pp=(1, 4), tp=(1,), micro_batches=(1,)))
    schedules = {schedule for schedule, _ in found.kinds}
    assert schedules == {"no pipeline", "1f1b", "gpipe", "interleaved", "zb-h1"}
    assert ("1f1b", "equal") in found.kinds and ("1f1b", "balanced") in found.kinds
    fastest = max(one.tokens_per_second for one in found.kinds.values() if one.fits(job.device))
    assert found.best[0].tokens_per_second >= fastest
    assert not found.kinds["no pipeline", "all"].fits(job.device), "7B and its state are too large for one device"


def test_steps_of_several_sizes_are_not_compared() -> None:
    """Without a global batch each layout's step would be another number of tokens."""
    job = setup()
    job = replace(job, config=replace(job.config, training=replace(job.config.training, global_batch_size=None)))
    with pytest.raises(ConfigError, match="give --global-batch-size"):
        search(job, Space())


def test_nothing_fits() -> None:
    with pytest.raises(
        ConfigError, match=r"no layout fits: the nearest, tp=.* GB more than the 37.60 GB that A100-40GB"
    ):
        search(setup(gpus=1, batch=2, device="A100-40GB"), Space())
    with pytest.raises(ConfigError, match="no layout of the model fits 7 devices"):
        search(setup(gpus=7, batch=8), Space(micro_batches=(3,)))


def test_thousands_of_devices_take_seconds() -> None:
    begin = time.process_time()
    search(
        setup("--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64", 4096, 4096),
        Space(),
    )
    assert time.process_time() - begin < 20
