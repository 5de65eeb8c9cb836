"""Writes a model as a Hugging Face directory that transformers loads, with exits beside the stock architecture.

The backbone is an architecture of transformers' own: AutoModelForCausalLM loads it and knows of no exits. Theirs lie in
exits.safetensors and exits.json, which modeling_ee_llm.py (copied beside them) reads.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron import faults
from megatron.checkpoint import commit
from megatron.checkpoint.commit import Staged
from megatron.checkpoint.convert import safetensors_file
from megatron.checkpoint.convert.base import Check, Source, TensorSpec
from megatron.checkpoint.convert.hf_config import CONFIG
from megatron.checkpoint.convert.hf_files import EXIT_TENSORS, SAFETENSORS, SHARD_INDEX
from megatron.checkpoint.convert.hf_names import EXITS, Names
from megatron.checkpoint.convert.hf_target import architecture_of, config_of
from megatron.checkpoint.convert.huggingface import EXIT_CONFIG, EXIT_FORMAT, kept_values
from megatron.checkpoint.legacy_names import has_vocabulary
from megatron.checkpoint.state import PADDING
from megatron.errors import ConfigError, StorageError
from megatron.logs import get_logger
from megatron.tokenizer.build import build_tokenizer

MAX_SHARD_BYTES = 5_000_000_000
_MODELING = Path(__file__).with_name("modeling_ee_llm.py")  # nothing here imports it: it needs transformers
_TOKENIZER_CONFIG = "tokenizer_config.json"
_WORD = "embedding.word.weight"
_log = get_logger(__name__)


@dataclass
class Shard:
    """Our tensors that go into one file, and what their tensors in it will be."""

    ours: list[str] = field(default_factory=list)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    size: int = 0  # bytes


def write_hf(
    source: Source, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES, check: Check | None = None
) -> None:
    """Write `source` as a directory that transformers loads; it appears whole or not at all.

    A file of tensors is larger than `max_shard_bytes` only where one tensor is. Rows that pad the vocabulary are left
    out, but for those that the model had when it came from Hugging Face. check: as of every `base.Writer`.

    Raises:
        ConfigError: no architecture of transformers computes the same.
        CheckpointError: the source cannot be read.
        StorageError: writing failed, or `directory` holds something already: it is never replaced.
    """
    _make_room(directory)
    content = _Content(source)
    backbone = content.shards([name for name in content.specs if not name.startswith(EXITS)], max_shard_bytes)
    exits = content.shards([name for name in content.specs if name.startswith(EXITS)], None)
    with commit.staged(directory) as staged:
        _write_backbone(staged, content, backbone)
        for shard in exits:
            _write_shard(staged, content, EXIT_TENSORS, shard)
        if source.config.exits.exit_layer_nums:
            _write_json(staged, EXIT_CONFIG, EXIT_FORMAT | asdict(source.config.exits))
            _copy(staged, _MODELING, _MODELING.name)
        _write_json(staged, CONFIG, content.config())
        _write_tokenizer(staged, source)
        if check is not None:
            check(staged.path)


class _Content:
    """What is written: names, shapes and tensors as transformers' architecture has them."""

    def __init__(self, source: Source) -> None:
        self._source, self._model = source, source.config.model
        came_as = source.facts.get("huggingface")
        self._came_as: dict[str, Any] = came_as if isinstance(came_as, dict) else {}
        self.kind = architecture_of(self._model, self._came_as.get("model_type"))
        self.names = Names.of(self.kind, self._model)
        self._given = source.specs()
        self._surplus = _surplus(self._given, self._came_as.get("vocab_size"))
        self.specs = {
            name: TensorSpec((spec.shape[0] + self._more_rows(name), *spec.shape[1:]), spec.dtype)
            for name, spec in self._given.items()
            if not name.endswith(PADDING)
        }

    def shards(self, ours: Iterable[str], most: int | None) -> list[Shard]:
        """Tensors by file of at most `most` bytes; what is one tensor of ours stays together."""
        shards: list[Shard] = []
        for name in ours:
            spec = self.specs[name]
            parts = self.names.split(name, torch.empty(spec.shape, device="meta"))
            size = safetensors_file.size_of(spec)
            if not shards or (most is not None and shards[-1].size + size > most):
                shards.append(Shard())
            shards[-1].ours.append(name)
            shards[-1].size += size
            for theirs, part in zip(self.names.theirs(name), parts, strict=True):
                shards[-1].specs[theirs] = TensorSpec(tuple(part.shape), spec.dtype)
                safetensors_file.code_of(theirs, spec)
        return shards

    def tensors(self, shard: Shard) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one after the other."""
        for name in shard.ours:
            tensor = self._source.read(name)
            if rows := self._more_rows(name):
                tensor = torch.cat((tensor, self._padding(name, tensor, rows)))
            yield from zip(self.names.theirs(name), self.names.split(name, tensor), strict=True)

    def config(self) -> dict[str, Any]:
        """config.json."""
        kept = kept_values(self._came_as)
        if "eos_token_id" not in kept:
            kept |= _token_ids(self._source)
        word = self.specs[_WORD]
        dtype = str(word.dtype).removeprefix("torch.")
        config = config_of(self._model, self.kind, word.shape[0], dtype, kept)
        if self._source.config.exits.exit_layer_nums:
            config["auto_map"] = {"AutoModel": f"{_MODELING.stem}.EarlyExitForCausalLM"}
        return config

    def _more_rows(self, name: str) -> int:
        return self._surplus if has_vocabulary(name) else 0

    def _padding(self, name: str, tensor: Tensor, rows: int) -> Tensor:
        """The padding of a tensor in so many rows; zero where it has fewer, as that of exits added since."""
        padding = tensor.new_zeros(rows, *tensor.shape[1:])
        if f"{name}{PADDING}" in self._given:
            found = self._source.read(f"{name}{PADDING}")[:rows]
            padding[: len(found)] = found
        return padding


def _surplus(given: Mapping[str, TensorSpec], came_with: Any) -> int:
    """Padding rows that the model had when it came from Hugging Face, which has no other padding."""
    padding = given.get(f"{_WORD}{PADDING}")
    if padding is None or not isinstance(came_with, int):
        return 0
    rows = came_with - given[_WORD].shape[0]
    return rows if 0 < rows <= padding.shape[0] else 0


def _make_room(directory: Path) -> None:
    commit.sweep(directory.parent, directory.name)  # what a killed conversion to the same place left
    try:
        taken = directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir())))
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error}") from error
    if taken:
        raise StorageError(f"{directory} exists and is not replaced: give another directory, or move it away")


def _write_backbone(staged: Staged, content: _Content, shards: list[Shard]) -> None:
    if len(shards) == 1:
        _write_shard(staged, content, SAFETENSORS, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(staged, content, name, shard)
        places |= dict.fromkeys(shard.specs, name)
    total = sum(shard.size for shard in shards)
    _write_json(staged, SHARD_INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_shard(staged: Staged, content: _Content, name: str, shard: Shard) -> None:
    path = staged.path / name
    staged.described[path] = safetensors_file.write(path, shard.specs, content.tensors(shard))


def _write_json(staged: Staged, name: str, content: dict[str, Any]) -> None:
    faults.point("huggingface.json")
    (staged.path / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_tokenizer(staged: Staged, source: Source) -> None:
    """The tokenizer's files, under the names by which transformers knows them."""
    tokenizer, files = source.config.tokenizer, source.tokenizer_files()
    known_as = {
        Path(given).name: name
        for given, name in ((tokenizer.vocab_file, "vocab.json"), (tokenizer.merge_file, "merges.txt"))
        if given
    }
    for path in files:
        name = known_as.get(path.name, path.name)
        name = "tokenizer.model" if path.suffix == ".model" else name
        if name != CONFIG:  # which the model's own has to be
            _copy(staged, path, name)
    if tokenizer.tokenizer_type == "GPT2BPETokenizer" and not (staged.path / _TOKENIZER_CONFIG).exists():
        _write_json(staged, _TOKENIZER_CONFIG, {"tokenizer_class": "GPT2Tokenizer"})


def _copy(staged: Staged, path: Path, name: str) -> None:
    faults.point("huggingface.copy")
    shutil.copyfile(path, staged.path / name)


def _token_ids(source: Source) -> dict[str, int | None]:
    """Where a text begins and ends, which transformers otherwise takes for the architecture's usual ids."""
    if source.config.tokenizer.tokenizer_type is None:
        return {}
    try:
        tokenizer = build_tokenizer(**asdict(source.config.tokenizer))
    except ConfigError as error:
        _log.warning("config.json will name no token that begins or ends a text: %s", error)
        return {}
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
