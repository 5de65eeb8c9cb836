"""`tools/check_cluster.py`, alone or under torchrun: what a cluster can do, and whether it computes what it should."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from megatron.cli.guard import run_guarded
from megatron.config.parallel import ParallelConfig
from megatron.errors import ClusterError, ConfigError, StorageError
from megatron.files import atomic_write
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh, launched_rank
from megatron.train.cluster import SLOW_SHARE, ClusterCheck, ClusterReport, slow_places

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_MOST_ROWS = 16


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = (
        "Measure every rank and what lies between them, and compare a small training step in every layout with one "
        "process. Exit code 1 where a layout computes wrongly, or a rank fails."
    )
    words = argparse.ArgumentParser(prog="check_cluster.py", description=about, allow_abbrev=False)
    words.add_argument("--output", type=Path, metavar="FILE", help="keep all figures here, as JSON")
    words.add_argument("--time-limit", type=float, default=120.0, metavar="S", help="seconds in all (default: 120)")
    words.add_argument(
        "--dtype", choices=_DTYPES, default="fp32", help="of the compared steps: how exact they are (default: fp32)"
    )
    words.add_argument("--distributed-backend", choices=("nccl", "gloo"), help="default: nccl with a GPU, gloo without")
    words.add_argument("--strict", action="store_true", help="slow ranks and groups end with 1, too")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    options = parser().parse_args(argv)
    rank = launched_rank()
    return run_guarded(lambda: _run(options), "stopped", rank)


def _run(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    if options.output and launched_rank() == 0 and not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no directory {options.output.parent}; make it first")
    backend = Backend.choose(options.distributed_backend)
    mesh = Mesh.build(ParallelConfig(distributed_timeout_minutes=max(options.time_limit / 60, 1.0)), backend)
    bar = tqdm(disable=not (mesh.is_main and sys.stderr.isatty()), dynamic_ncols=True, file=sys.stderr)

    def begin(part: str, count: int) -> None:
        bar.total = count
        bar.set_description(part, refresh=False)
        bar.update(1)

    with mesh.noticing_loss(), bar:
        check = ClusterCheck(mesh, _DTYPES[options.dtype], lambda: begun + options.time_limit - time.monotonic(), begin)
        report = check.run()
        mesh.close()
    if mesh.is_main:
        sys.stdout.write("".join(f"{line}\n" for line in lines(report, time.monotonic() - begun)))
        if options.output:
            _keep(options.output, report)
    faults = report.wrong + (report.slow if options.strict else [])
    if faults:
        error = ClusterError(faults[0] + (f" (and {len(faults) - 1} more, above)" if len(faults) > 1 else ""))
        error.everywhere = True
        raise error


def _keep(path: Path, report: ClusterReport) -> None:
    try:
        with atomic_write(str(path)) as file:
            file.write(json.dumps(report.as_json(), indent=1, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise StorageError(f"--output {path} could not be written: {error}") from error


def lines(report: ClusterReport, seconds: float) -> Iterator[str]:
    """The report for people."""
    machines = len(dict.fromkeys(report.hosts))
    yield (
        f"{report.world_size} process{'es' * (report.world_size > 1)} on {machines} machine{'s' * (machines > 1)}, "
        f"{report.backend}, {report.device}, torch {report.torch}"
    )
    yield from ("", *_rank_lines(report))
    if report.links:
        yield from ("", *_link_lines(report))
    if report.layouts:
        yield from ("", *_layout_lines(report))
    yield ""
    for title, sentences in {"no time for": report.not_tried, "slow": report.slow, "WRONG": report.wrong}.items():
        yield from (f"{title}: {sentence}" for sentence in sentences)
    yield (
        f"{len(report.wrong)} wrong, {len(report.slow)} slow (below the median by more than {SLOW_SHARE:.0%}), "
        f"{len(report.not_tried)} not tried, {seconds:.0f} s"
    )


def _rank_lines(report: ClusterReport) -> Iterator[str]:
    """A line for each rank, where there are many for the slowest alone."""
    yield f"{'ranks':<40} {'TFLOP/s':>10} {'copy GB/s':>10}"
    flops, copies = ([rank[kind] for rank in report.ranks] for kind in ("flops_per_second", "memory_bytes_per_second"))
    slow = {*slow_places(flops), *slow_places(copies)}
    shown = sorted(sorted(range(report.world_size), key=lambda rank: flops[rank])[:_MOST_ROWS])
    for rank in shown:
        mark = "  SLOW" if rank in slow else ""
        yield f"  {report.who([rank]):<38} {flops[rank] / 1e12:10.3f} {copies[rank] / 1e9:10.1f}{mark}"
    if len(shown) < report.world_size:
        yield f"  the other {report.world_size - len(shown)} are faster"
    yield f"  {'median':<38} {statistics.median(flops) / 1e12:10.3f} {statistics.median(copies) / 1e9:10.1f}"


def _link_lines(report: ClusterReport) -> Iterator[str]:
    """A line for each operation of each kind of group."""
    yield f"{'links':<40} {'groups':>10} {'median GB/s':>12} {'slowest':>8} {'latency':>10}"
    for names, links in groupby(report.links, lambda link: link.names):
        yield f"  {' = '.join(names)}"
        for link in links:
            rates, slowest = [group.bytes_per_second / 1e9 for group in link.groups], link.slowest
            latency = max(group.latency_seconds for group in link.groups) * 1e6
            yield (
                f"    {link.operation:<36} {len(rates):10d} {statistics.median(rates):12.2f} "
                f"{slowest.bytes_per_second / 1e9:8.2f} {latency:7.0f} µs  slowest: {report.who(slowest.ranks)}"
            )


def _layout_lines(report: ClusterReport) -> Iterator[str]:
    """A line for each layout: how far it is from one process."""
    yield f"{f'one step against one process, {report.dtype}, allowed {report.tolerance:.0e}':<70} largest difference"
    for tried in report.layouts:
        verdict = "ok   " if tried.error <= report.tolerance else "WRONG"
        shown = f"{tried.error:.1e}" if math.isfinite(tried.error) else "not finite"
        yield f"  {verdict} {tried.layout:<62} {shown}  {tried.what}"
