"""`pretrain_early_exit_gpt.py`: from the command line to a finished run, and from an error to an exit code."""

import sys
from collections.abc import Callable, Sequence

from megatron.config.load import Loaded, load
from megatron.errors import EELLMError
from megatron.logs import get_logger, setup_logging
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.loop import train

log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train (or with --skip-train evaluate) as the flags say; returns the process's exit code."""
    return run_guarded(lambda: _pretrain(sys.argv[1:] if argv is None else list(argv)))


def run_guarded(body: Callable[[], None]) -> int:
    """Run an entry point: errors meant for the user become one message on standard error and their exit code."""
    setup_logging()
    try:
        body()
    except EELLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 130
    return 0


def _pretrain(argv: list[str]) -> None:
    loaded = load(argv)
    for note in loaded.notes:
        log.info("%s", note)
    config = _with_checkpoint_args(loaded)
    trainer = build_trainer(config)
    backend = trainer.mesh.backend
    parameters = sum(p.numel() for p in trainer.model.parameters())
    log.info("model: %s parameters on %s (tp=1 pp=1 dp=1)", f"{parameters:,}", backend.name())
    checkpoints.start(trainer)
    log.info("%s", f"run ended: {train(trainer)}")


def _with_checkpoint_args(loaded: Loaded):
    raise NotImplementedError
