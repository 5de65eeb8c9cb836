"""The run's data: datasets of the right length, and microbatches on the device from any position on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from megatron.data.build import Dataset, build_datasets
from megatron.data.loader import Microbatch, build_loader, make_microbatch
from megatron.data.sampler import BatchOrder
from megatron.data.splits import samples_per_split
from megatron.errors import ConfigError, DataError
from megatron.train.batch_size import global_batch_size, training_length
from megatron.train.trainer import Trainer


@dataclass(frozen=True)
class Datasets:
    """Train, validation and test data; None where the flags give none."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


def make_datasets(trainer: Trainer) -> Datasets:
    """Build (or map from cache) the datasets that the flags ask for. Raises ConfigError if there are none."""
    data, training = trainer.config.data, trainer.config.training
    if not (data.data_path or data.train_data_path or data.valid_data_path):
        raise ConfigError("--data-path is missing: give the prefix of a .bin/.idx pair (see tools/preprocess_data.py)")
    dp_size = trainer.mesh.size("dp")
    counts = samples_per_split(
        train_iters=training_length(training, dp_size)[0],
        train_samples=training.train_samples,
        global_batch_size=global_batch_size(training, 1 << 62, dp_size),
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
    )
    length, seed = trainer.config.model.seq_length, training.seed
    build = partial(build_datasets, data, counts, length, seed, trainer.vocab_size)
    built: list[tuple] = []
    trainer.peers.lead(lambda: built.append(build()))  # the others then find the first rank's index cache
    return Datasets(*(built[0] if built else build()))


def microbatches(trainer: Trainer, dataset: Dataset, consumed_samples: int) -> Iterator[Microbatch]:
    """This rank's microbatches from the given position on, on the run's device."""
    data, training, mesh = trainer.config.data, trainer.config.training, trainer.mesh
    order = BatchOrder(
        micro_batch_size=training.micro_batch_size,
        consumed_samples=consumed_samples,
        dp_rank=mesh.rank("dp"),
        dp_size=mesh.size("dp"),
        dataloader_type=data.dataloader_type,
        seed=training.seed,
        data_sharding=data.data_sharding,
    )
    for text in build_loader(dataset, order, data.num_workers, pin_memory=mesh.backend.is_cuda):
        yield make_microbatch(
            text.to(mesh.backend.device, non_blocking=True),
            eod=trainer.tokenizer.eod,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
        )


def step_batches(trainer: Trainer, stream: Iterator[Microbatch]) -> list[Microbatch]:
    """The microbatches of the next optimizer step. Raises DataError where the data end."""
    training, dp_size = trainer.config.training, trainer.mesh.size("dp")
    samples = global_batch_size(training, trainer.progress.consumed_samples, dp_size)
    count = samples // (training.micro_batch_size * dp_size)
    batches = list(islice(stream, count))
    if len(batches) < count:
        raise DataError(
            f"the training data ended after {trainer.progress.consumed_samples} samples: "
            "give more data, fewer --train-iters/--train-samples, or --dataloader-type cyclic"
        )
    return batches
