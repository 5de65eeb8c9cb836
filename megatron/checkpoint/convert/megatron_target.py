"""Writes Megatron's format: a file for each tensor- and pipeline-parallel rank, a stage's files side by side."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron import faults
from megatron.checkpoint import commit
from megatron.checkpoint import legacy_names as names
from megatron.checkpoint.convert.base import Check, Layout, Source, TensorSpec, check_free
from megatron.checkpoint.convert.megatron_args import check_divisible, check_holdable, namespace, padded_rows
from megatron.checkpoint.convert.torch_file import TorchFile
from megatron.checkpoint.find import LEGACY_FILE, TRACKER, iteration_name
from megatron.checkpoint.state import PADDING
from megatron.errors import StorageError

_VERSION = 3.0
_IN_LAYER = re.compile(r"(?:layers\.(\d+)|exits\.(\d+))\.")
_EMBEDDING = "embedding.word.weight"


@dataclass(frozen=True)
class _Stage:
    """Layers [first, last) and what else lies there."""

    index: int
    first: int
    last: int
    exits: tuple[int, ...]  # in the order of --exit-layer-nums
    is_first: bool
    is_last: bool

    def holds(self, name: str) -> bool:
        """Whether a tensor of ours lies here."""
        if match := _IN_LAYER.match(name):
            return self.first <= (int(match[1]) if match[1] else int(match[2]) - 1) < self.last
        return self.is_first if name.startswith("embedding.") else self.is_last


@dataclass(frozen=True)
class _Place:
    """A tensor of a stage's files: where each keeps its part, of what shape, and how the whole is read and cut."""

    path: tuple[str, ...]
    part: TensorSpec
    dim: int | None
    wholes: tuple[Callable[[], Tensor], ...]  # one; or gate and up, which are cut apart and stacked in each file


def write(source: Source, root: Path, layout: Layout, check: Check) -> Path:
    """Write `source` as `<root>/iter_*`, for as many ranks as `layout` says, and point the tracker at it.

    Errors as of every Writer; what the format can't hold is refused by name.
    """
    config = source.config
    tp = layout.tp or config.parallel.tensor_model_parallel_size
    pp = layout.pp or config.parallel.pipeline_model_parallel_size
    check_holdable(config)
    check_divisible(config, tp, pp)
    specs = source.specs()
    true = specs[_EMBEDDING].shape[0]
    rows = padded_rows(config, true, tp)
    args = namespace(config, source.facts.get("args", {}), source.facts, specs[_EMBEDDING].dtype, tp, pp, rows)
    final = root / iteration_name(source.iteration)
    check_free(final)
    commit.sweep(root)
    with commit.staged(final) as staged:
        for stage in _stages(source, pp):
            state = {"args": args, "checkpoint_version": _VERSION, "iteration": source.iteration}
            places = {place.path: place for place in _places(source, stage, tp, rows)}
            model = _nested(places)
            with _files(staged, stage, tp, pp, state | {"model": model}) as files:
                for place in (places[path] for path in _paths(model)):
                    _write_place(place, files)
        check(staged.path)
    commit.replace_file(root / TRACKER, f"{source.iteration}\n")
    return final


def _write_place(place: _Place, files: list[TorchFile]) -> None:
    """Each file's part of a tensor, which is forgotten then."""
    wholes = [read() for read in place.wholes]
    for rank, file in enumerate(files):
        file.write(_part(wholes, place.dim, rank, len(files)))


def _stages(source: Source, pp: int) -> list[_Stage]:
    config = source.config
    each = config.model.num_layers // pp
    numbers = config.exits.exit_layer_nums
    return [
        _Stage(
            index, index * each, (index + 1) * each,
            tuple(n for n in numbers if index * each < n <= (index + 1) * each),
            index == 0, index == pp - 1,
        )
        for index in range(pp)
    ]  # fmt: skip


def _places(source: Source, stage: _Stage, tp: int, rows: int) -> Iterator[_Place]:
    """Every tensor of a stage."""
    config, specs = source.config, source.specs()
    for name, spec in specs.items():
        if name.endswith(PADDING) or ".gate." in name or not stage.holds(name):
            continue
        dim = names.split_dim(name)
        path = names.legacy_path(name, stage.first, stage.exits, config.exits.use_exit_mlp)
        shape = list(spec.shape)
        reads: tuple[Callable[[], Tensor], ...] = (_reader(source, name),)
        if names.has_vocabulary(name):
            shape[0] = rows
            reads = (_vocabulary(source, name, rows),)
        elif names.is_up(name) and config.model.gated:
            shape[0] *= 2
            reads = (_reader(source, names.gate_of(name)), *reads)
        yield _Place(path, _cut(spec, shape, dim, tp), dim, reads)
    if _has_copy(config.model.untie_embeddings_and_output_weights, config.exits.untie_exit_output_weights, stage):
        path = tuple(names.TIED_COPY.split("."))
        spec = specs[_EMBEDDING]
        part = _cut(spec, [rows, *spec.shape[1:]], 0, tp)
        yield _Place(path, part, 0, (_vocabulary(source, _EMBEDDING, rows),))


def _has_copy(untied: bool, untied_exits: bool, stage: _Stage) -> bool:
    """Whether a stage keeps a copy of the word embedding.

    With tied embeddings the original gives one to every later stage with a head of any kind, used or not.
    """
    if stage.is_first:
        return False
    return (bool(stage.exits) and not (untied and untied_exits)) or (stage.is_last and not untied)


def _reader(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name)


def _vocabulary(source: Source, name: str, rows: int) -> Callable[[], Tensor]:
    """Reads a matrix of the vocabulary with so many rows: the true ones, padding as far as there is any, and zeros."""

    def read() -> Tensor:
        true = source.read(name)
        if len(true) == rows:
            return true
        padded = true.new_zeros(rows, *true.shape[1:])
        padded[: len(true)] = true
        if name + PADDING in source.specs() and rows > len(true):
            rest = source.read(name + PADDING)[: rows - len(true)]
            padded[len(true) : len(true) + len(rest)] = rest
        return padded

    return read


def _cut(spec: TensorSpec, shape: list[int], dim: int | None, tp: int) -> TensorSpec:
    shape = list(shape)
    if dim is not None:
        shape[dim] //= tp
    return replace(spec, shape=tuple(shape))


def _part(wholes: list[Tensor], dim: int | None, rank: int, tp: int) -> Tensor:
    """What a tensor-parallel rank has of a tensor, or of gate and up."""
    if dim is None:
        return wholes[0]
    parts = [whole.chunk(tp, dim)[rank] for whole in wholes]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _nested(places: Mapping[tuple[str, ...], _Place]) -> dict[str, Any]:
    """The `model` of a file, with what is known of each tensor in its place."""
    model: dict[str, Any] = {}
    for path, place in places.items():
        level = model
        for key in path[:-1]:
            level = level.setdefault(key, OrderedDict())
        level[path[-1]] = place.part
    return model


def _paths(model: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all tensors in the order in which a file has them."""
    for key, value in model.items():
        if isinstance(value, TensorSpec):
            yield (*above, key)
        else:
            yield from _paths(value, (*above, key))


@contextmanager
def _files(
    staged: commit.Staged, stage: _Stage, tp: int, pp: int, content: Mapping[str, Any]
) -> Iterator[list[TorchFile]]:
    """The files of a stage's tensor-parallel ranks, open for their tensors."""
    files: list[TorchFile] = []
    try:
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}_{stage.index:03d}" if pp > 1 else f"mp_rank_{rank:02d}"
            try:
                faults.point("legacy.mkdir")
                (staged.path / name).mkdir()
            except OSError as error:
                raise StorageError(f"cannot write {staged.path}: {error}") from error
            files.append(TorchFile(staged.path / name / LEGACY_FILE, content))
        yield files
        for file in files:
            staged.described[file.path] = file.close()
    finally:
        for file in files:
            file.abandon()
