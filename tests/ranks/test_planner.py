"""The planner against real runs of several ranks; `benchmarks/planner.py` has more layouts, and time.

In fp32: for 16-bit products on CPUs, libraries keep packed matrices of their own, 20 MB here.
"""

import pytest

from megatron.config.load import load
from megatron.planning.device import Device
from megatron.planning.estimate import Setup, estimate
from megatron.testing.rank_memory import measure_in_fresh_processes

RUN = """--num-layers 6 --hidden-size 256 --num-attention-heads 8 --seq-length 256 --exit-layer-nums 1 4
    --micro-batch-size 8 --global-batch-size 32 --attention-dropout 0 --hidden-dropout 0 --train-iters 9 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size 4095 --data-path none"""
LAYOUTS = {
    "zb-h1": "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1",
    "interleaved": "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tt|t|ttL",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_and_order_are_as_planned(layout: str) -> None:
    words = [*RUN.split(), *LAYOUTS[layout].split()]
    device = Device("core", 1e10, 8e9, 1e10, 1e9, 1e9, 1, "cpu")
    plan = estimate(Setup(load(words).config, 2, 4096, device))
    for rank in measure_in_fresh_processes(words, 2):
        assert rank.actions == tuple(str(span.action) for span in plan.timeline.spans[rank.pp])
        assert rank.peak == pytest.approx(plan.ranks[rank.pp].memory, rel=0.10)
