"""Evaluation's numbers."""

import math

from megatron.train.evaluate import HeadMetrics, metric_names


def test_perplexity() -> None:
    assert HeadMetrics(2.0, 0.5, 1.0).perplexity == math.exp(2.0)
    assert HeadMetrics(99.0, 0.5, 1.0).perplexity == math.exp(20.0)
    assert math.isnan(HeadMetrics(math.nan, 0.0, 1.0).perplexity)


def test_metric_names() -> None:
    flat = metric_names({"2": HeadMetrics(0.0, 0.25, 0.75), "final": HeadMetrics(0.0, 0.5, 1.0)})
    assert flat == {
        "loss/exit_2": 0.0, "ppl/exit_2": 1.0, "accuracy/exit_2": 0.25, "agreement/exit_2": 0.75,
        "loss/final": 0.0, "ppl/final": 1.0, "accuracy/final": 0.5,
    }  # fmt: skip
