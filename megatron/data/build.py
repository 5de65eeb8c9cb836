"""The three datasets of a run, from the data flags: one corpus cut by --split, or files for each split."""

from dataclasses import dataclass

from megatron.config.data import DataConfig
from megatron.config.mixture import parse_blend
from megatron.data.blend import BlendedDataset, normalised, requests
from megatron.data.gpt import GPTDataset, SampleSpec
from megatron.data.indexed import IndexedDataset
from megatron.data.splits import SPLIT_NAMES, split_documents
from megatron.errors import ConfigError, DataError
from megatron.logs import get_logger

logger = get_logger(__name__)

Dataset = GPTDataset | BlendedDataset


def build_datasets(
    data: DataConfig,
    num_samples: tuple[int, int, int],
    seq_length: int,
    seed: int,
    vocab_size: int | None = None,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Train, valid and test datasets of at least `num_samples` samples each (see `samples_per_split`).

    Args:
        data: `data_path` with `split`, or `{train,valid,test}_data_path`; `data_cache_path`.
        num_samples: a split with 0 is None and its files are not opened.
        seq_length: a sample has one token more.
        seed: of the order of documents and samples.
        vocab_size: tokens outside [0, vocab_size) are an error when they are read.

    A validation or test split without documents is None, with a warning: small corpora leave none to a share of
    0.1 %. In a blend the datasets that have some share its weight.

    Raises:
        ConfigError: flags that contradict each other or miss.
        DataError: broken files, or a training split without documents.
    """
    separate = [name for name in SPLIT_NAMES if getattr(data, f"{name}_data_path")]
    if data.data_path and separate:
        raise ConfigError("--data-path and --train/valid/test-data-path exclude each other; give one kind")
    if not data.data_path and "train" not in separate and num_samples[0]:
        raise ConfigError("no training data: give --data-path or --train-data-path")
    builder = _Builder(data, seq_length, seed, vocab_size)
    train, valid, test = (
        builder.build(name, requested) for name, requested in zip(SPLIT_NAMES, num_samples, strict=True)
    )
    return train, valid, test


@dataclass(frozen=True)
class _Member:
    """One file's part in a split."""

    reader: IndexedDataset
    documents: range
    weight: float


class _Builder:
    """Builds one split at a time; every file is opened once and shared by the splits."""

    def __init__(self, data: DataConfig, seq_length: int, seed: int, vocab_size: int | None) -> None:
        self.data = data
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.split = data.split if data.data_path else None
        self._readers: dict[str, IndexedDataset] = {}

    def build(self, name: str, requested: int) -> Dataset | None:
        flag = "--data-path" if self.data.data_path else f"--{name}-data-path"
        entries = self.data.data_path or getattr(self.data, f"{name}_data_path")
        if not entries or not requested:
            return None
        prefixes, weights = parse_blend(entries, flag)
        members = self._members(prefixes, weights or [1.0], name)
        if not members:
            return None
        if weights is None:
            return self._dataset(members[0], name, requested)
        shares = normalised([member.weight for member in members])
        asked = requests(requested, shares)
        datasets = [self._dataset(member, name, samples) for member, samples in zip(members, asked, strict=True)]
        return BlendedDataset(datasets, shares, sum(asked), self.data.data_cache_path)

    def _members(self, prefixes: list[str], weights: list[float], name: str) -> list[_Member]:
        """The files that take part. One of weight 0 is switched off: in the blend it could still win a tie."""
        members = []
        for prefix, weight in zip(prefixes, weights, strict=True):
            if not weight:
                continue
            if prefix not in self._readers:
                self._readers[prefix] = IndexedDataset(prefix)
            reader = self._readers[prefix]
            documents = self._documents(reader, name)
            if documents:
                members.append(_Member(reader, documents, weight))
        return members

    def _documents(self, reader: IndexedDataset, name: str) -> range:
        """This split's documents; none of them is an error in training and a warning elsewhere."""
        if self.split is None:
            documents = range(len(reader))
        else:
            documents = split_documents(self.split, len(reader))[SPLIT_NAMES.index(name)]
        if not documents:
            where = "" if self.split is None else f" of --split {self.split}"
            message = f"{reader.prefix}: none of its {len(reader)} documents belongs to the {name} split{where}"
            if name == "train":
                raise DataError(f"{message}; give it a larger share, or more data")
            logger.warning("%s; it takes no part there", message)
        return documents

    def _dataset(self, member: _Member, name: str, requested: int) -> GPTDataset:
        spec = SampleSpec(name, requested, self.seq_length, self.seed, self.split)
        cache = self.data.data_cache_path
        return GPTDataset(member.reader, member.documents, spec, cache, self.vocab_size)
