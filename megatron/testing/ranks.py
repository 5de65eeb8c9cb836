"""A pool of gloo processes that tests run functions on: started once, used for any number of ranks up to its size.

A fresh launch of ranks costs seconds, a function on a waiting pool milliseconds.
"""

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.parallel import ParallelConfig
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh

_START_SECONDS = 120.0


class RankError(AssertionError):
    """A function failed on some ranks; the message holds their tracebacks."""


class Ranks:
    """Up to `size` processes. `run` calls a function on the first few of them, as the ranks of one mesh."""

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._size = size

    def run(
        self, function: Callable[..., Any], *args: object, tp: int = 1, pp: int = 1, dp: int = 1, timeout: float = 60.0
    ) -> list[Any]:
        """`function(mesh, *args)` on tp * pp * dp ranks; returns their answers by rank.

        The function must be at the top of an importable module, arguments and answers must pickle. A rank that
        fails or says nothing for `timeout` seconds is a RankError, and the pool is made anew.
        """
        count = tp * pp * dp
        if count > self._size:
            raise ValueError(f"the pool has {self._size} ranks, {count} were asked for")
        self._start(count)
        with tempfile.TemporaryDirectory() as directory:
            config = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
            task = (f"{directory}/store", count, config, function.__module__, function.__qualname__, args)
            for rank, (_, pipe) in enumerate(self._workers[:count]):
                pipe.send((rank, *task))
            return self._collect(count, timeout)

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []

    def _start(self, count: int) -> None:
        missing = range(len(self._workers), count)
        for _ in missing:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, pipe in self._workers[missing.start :]:
            if not pipe.poll(_START_SECONDS) or pipe.recv() != "ready":
                raise RankError("a rank did not start")

    def _collect(self, count: int, timeout: float) -> list[Any]:
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:count])}
        answers: list[Any] = [None] * count
        failures: dict[int, str] = {}
        while pending:
            # once one has failed the others may wait for it for ever
            ready = wait(list(pending), timeout=2.0 if failures else timeout)
            if not ready:
                failures |= {rank: "no answer" for rank in pending.values()}
                break
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    failed, answers[rank] = pipe.recv()
                except EOFError:
                    failed, answers[rank] = True, "died"
                if failed:
                    failures[rank] = answers[rank]
        if failures:
            self.close()
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return answers


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            rank, store, count, config, module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, _call(rank, store, count, config, module, name, args))
        except BaseException:  # noqa: BLE001 - whatever it is, the test is told
            answer = (True, traceback.format_exc())
        pipe.send(answer)


def _call(rank: int, store: str, count: int, config: ParallelConfig, module: str, name: str, args: tuple) -> Any:
    os.environ["WORLD_SIZE"] = str(count)
    if count > 1:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=timedelta(seconds=50)
        )
    mesh = Mesh.build(config, Backend(torch.device("cpu"), "gloo"))
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return function(mesh, *args)
    finally:
        mesh.close()
