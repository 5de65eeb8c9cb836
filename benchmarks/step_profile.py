"""Where a training step's time goes, ours beside that of transformers: self time of each kernel, by kind of work.

The shapes are those of train_step.py. With --output the picture is kept beside the JSON (same name, .png).
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from report import Figure, arguments, finish
from torch.profiler import ProfilerActivity, profile
from train_step import Shape, our_step, transformers_step

from megatron.parallel.backend import Backend

# kind of work -> beginnings of the names of its kernels; the first that fits counts
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "aten::linalg_vector_norm", "Optimizer"),
    "softmax and cross-entropy": (
        "aten::exp", "aten::amax", "aten::sub_", "aten::_log_softmax", "aten::nll",
        "autograd::engine::evaluate_function: LogSoftmax", "aten::logsumexp", "aten::gather",
    ),
    "copies and fills": (
        "aten::cat", "aten::copy_", "aten::fill_", "aten::clone", "aten::contiguous", "aten::index", "aten::embedding",
    ),
    "other elementwise work": ("aten::",),
    "Python and autograd": ("",),
}  # fmt: skip


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel of this name does."""
    return next(kind for kind, names in KINDS.items() if kernel.startswith(names))


def milliseconds(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Self time a step, by kind; on a GPU that of its kernels."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(2):
        step()
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    totals = dict.fromkeys(KINDS, 0.0)
    for kernel in recorded.key_averages():
        spent = kernel.self_device_time_total if on_gpu else kernel.self_cpu_time_total
        totals[kind_of(kernel.key)] += spent / 1000 / steps
    return totals


def draw(profiles: dict[str, dict[str, float]], path: Path) -> None:
    """One bar for each contestant, cut by kind of work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.6))
    left = dict.fromkeys(profiles, 0.0)
    for kind in KINDS:
        widths = [profiles[name][kind] for name in profiles]
        axes.barh(list(profiles), widths, left=list(left.values()), label=kind)
        left = {name: left[name] + profiles[name][kind] for name in profiles}
    axes.set_xlabel("milliseconds a step, one thread")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def figures_of(options: Namespace) -> list[Figure]:
    """Shares of the step, for each contestant."""
    torch.set_num_threads(1)  # self times of one thread add up
    shape = Shape(layers=4, hidden=64, ffn=192, vocab=1024, length=64) if options.quick else Shape()
    contestants = {
        "EE-LLM": our_step(shape, (), Backend.choose()),
        "EE-LLM, 2 exits": our_step(shape, (2, 4), Backend.choose()),
    }
    if theirs := transformers_step(shape):
        contestants["transformers"] = theirs
    profiles = {name: milliseconds(step, 2 if options.quick else 8) for name, step in contestants.items()}
    if options.output:
        draw(profiles, options.output.with_suffix(".png"))
    return [
        Figure(f"{name}: {kind}", spent, "ms") for name, kinds in profiles.items() for kind, spent in kinds.items()
    ] + [
        Figure(f"{name}: products and attention", (kinds["matrix products"] + kinds["attention"]) / sum(kinds.values()))
        for name, kinds in profiles.items()
    ]


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    return finish("step_profile", figures_of(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
