"""`pretrain_early_exit_gpt.py`: from the command line to a finished run, and from an error to an exit code."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.find import Found, recognise
from megatron.checkpoint.stored_run import stored_args, stored_config
from megatron.cli.dry_run import dry_run
from megatron.cli.guard import run_guarded
from megatron.config.flags import read_argv
from megatron.config.load import check_training, load, merge_checkpoint_args
from megatron.config.run import RunConfig
from megatron.errors import ConfigError
from megatron.logs import get_logger, setup_logging
from megatron.parallel.mesh import launched_rank, leads_node
from megatron.train import checkpoints
from megatron.train.build import build_trainer, count_parameters
from megatron.train.loop import train
from megatron.train.signals import StopSignal
from megatron.train.status import reported
from megatron.train.trainer import Trainer

log = get_logger(__name__)
ENTRY = "pretrain_early_exit_gpt.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Train (or with --skip-train evaluate) as the flags say; returns the process's exit code."""
    rank = launched_rank()
    setup_logging(rank=rank)
    return run_guarded(lambda: _pretrain(sys.argv[1:] if argv is None else list(argv)), rank=rank)


def _pretrain(argv: list[str]) -> None:
    try:
        config, found = resolve_config(argv)
    except ConfigError as error:
        error.everywhere = not leads_node()  # flags are the same for all, files need not be
        raise
    if config.logging.dry_run:
        if launched_rank() == 0:
            dry_run(config)
        return
    trainer = build_trainer(config)
    with trainer.mesh.noticing_loss():
        _train(trainer, found)
        trainer.mesh.close()  # not after an error: that could wait for ranks that are gone


def _train(trainer: Trainer, found: Found | None) -> None:
    log.info("model: %s parameters on %s (%s)", f"{count_parameters(trainer):,}", trainer.mesh.backend.name(),
             trainer.mesh.describe())  # fmt: skip
    checkpoints.start(trainer, found)
    # A signal that comes as the run ends changes nothing any more.
    with StopSignal() as stop, reported(trainer) as status, trainer.mesh.noticing_loss():
        status.reason = train(trainer, stop, status.started)
    log.info("run ended: %s", status.reason)


def resolve_config(argv: list[str]) -> tuple[RunConfig, Found | None]:
    """The run's config from flags, config file and --load's checkpoint; and that checkpoint if asked, verified once.

    With --load and no --num-layers the checkpoint says what isn't given: `--load DIR` alone continues or evaluates.
    """
    answers, config_file = read_argv(argv, ENTRY)
    given = answers.values
    base = found = None
    if given.get("load") and "num_layers" not in given and config_file is None and "use_checkpoint_args" not in given:
        found = recognise(Path(given["load"]), given.get("load_iteration") or None)
        base = stored_config(found)
    loaded = load(argv, ENTRY, base)
    for note in loaded.notes:
        log.info("%s", note)
    config = loaded.config
    if config.checkpoint.use_checkpoint_args and (found := checkpoints.find(config)):
        config = merge_checkpoint_args(config, loaded.given, stored_args(found), str(found.directory))
    if not config.logging.dry_run:  # which needs no data
        check_training(config)
    return config, found
