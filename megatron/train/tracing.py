"""--trace: what the ranks of a pipeline did in a step, as a file for trace viewers and a picture of it."""

import json
from pathlib import Path

from megatron.errors import ConfigError
from megatron.files import atomic_write
from megatron.logs import get_logger
from megatron.schedule.draw import figure
from megatron.schedule.simulate import simulate
from megatron.schedule.trace import Happened, Recorder, measured_costs, timeline, trace_events
from megatron.train.trainer import Trainer

log = get_logger(__name__)
_STEPS = 3  # of a start: the first ones warm up, the last one traced stays


class Tracer:
    """Records the first steps of a run; each overwrites the trace of the one before. Every rank calls every method."""

    def __init__(self, trainer: Trainer) -> None:
        """Raises ConfigError where the file's directory is missing."""
        path = trainer.config.logging.trace
        self._trainer, self._left = trainer, _STEPS if path else 0
        self._path = Path(path) if path else None
        if self._path is not None:
            trainer.peers.lead(self._check)

    def _check(self) -> None:
        if not self._path.parent.is_dir():
            raise ConfigError(f"--trace {self._path}: there is no directory {self._path.parent}: make it")

    def begin(self) -> Recorder | None:
        """A recorder for the step to come, if it is one of those; all ranks' clocks begin together."""
        if not self._left:
            return None
        self._left -= 1
        backend = self._trainer.mesh.backend
        self._trainer.peers.gather(None)  # none goes on before all are here
        return Recorder(backend.stamp, backend.seconds)

    def end(self, recorder: Recorder | None, num_microbatches: int) -> None:
        """Write what was recorded. A disk that refuses is no reason to end: it is said."""
        if recorder is None:
            return
        mesh = self._trainer.mesh
        mesh.backend.synchronize()
        ranks = self._trainer.peers.gather((mesh.ranks, recorder.happened()))
        if not mesh.is_main:
            return
        pipeline = [happened for (_, dp, tp), happened in ranks if dp == tp == 0]
        try:
            with atomic_write(str(self._path)) as file:
                named = [(mesh.place(rank), happened) for rank, (_, happened) in enumerate(ranks)]
                file.write(json.dumps(trace_events(named)).encode())
            self._draw(pipeline, num_microbatches)
        except OSError as error:
            log.error("--trace %s: %s", self._path, error.strerror or error)

    def _draw(self, ranks: list[list[Happened]], num_microbatches: int) -> None:
        """The picture beside the trace."""
        simulated = simulate(self._trainer.plan(num_microbatches).schedule, measured_costs(ranks))
        panels = [("measured", timeline(ranks)), ("simulated with the median times measured", simulated)]
        try:
            picture = figure([(title, each.scaled(1e3)) for title, each in panels], "ms")
        except ConfigError as error:  # no matplotlib
            log.warning("--trace: no picture beside the trace: %s", error)
            return
        with atomic_write(str(self._path.with_suffix(".png"))) as file:
            picture.savefig(file, format="png", dpi=150)
