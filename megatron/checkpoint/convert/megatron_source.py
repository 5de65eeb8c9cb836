"""A checkpoint of Megatron-LM or EE-LLM as a converter's source: tensors are read when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import legacy_names as names
from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.legacy_facts import optimizer_facts
from megatron.checkpoint.megatron_legacy import (
    Parts,
    Ranks,
    Stage,
    facts_of,
    number_stages,
    open_ranks,
    optimizer_shards,
    refuse_sharded_optimizer,
    reorder_qkv,
)
from megatron.checkpoint.safe import read_legacy, read_span
from megatron.checkpoint.state import MODEL, OPTIMIZER
from megatron.config.parallel import ParallelConfig
from megatron.config.stored import from_checkpoint
from megatron.errors import CheckpointError
from megatron.logs import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Joined:
    """A tensor of ours: the parts of files it is joined from, along `dim`; None: each of them is all of it."""

    pieces: tuple[tuple[Path, Tensor], ...]
    dim: int | None

    def spec(self) -> TensorSpec:
        shape = list(self.pieces[0][1].shape)
        if self.dim is not None:
            shape[self.dim] = sum(tensor.shape[self.dim] for _, tensor in self.pieces)
        return TensorSpec(tuple(shape), self.pieces[0][1].dtype)


class MegatronSource:
    """`iter_*/` or `release/` with all its ranks; vocabularies come with the rows that pad them.

    Raises:
        CheckpointError: as `megatron_legacy.read`; files are looked through for their names and shapes, not read.
        ConfigError: the model breaks a rule.
    """

    def __init__(self, directory: Path) -> None:
        self._ranks = open_ranks(directory, data=False)
        self._looked = False  # for the optimizer's state
        stages, parts = number_stages(self._ranks)
        self._shards, self._copies = _shards(self._ranks, stages, parts, MODEL)
        if f"{MODEL}embedding.word.weight" not in self._shards:
            raise CheckpointError(f"{directory} holds no word embedding: the checkpoint is damaged")
        ranks, config = self._ranks, from_checkpoint(self._ranks.args, str(directory))
        parallel = ParallelConfig(tensor_model_parallel_size=ranks.tp, pipeline_model_parallel_size=ranks.pp)
        rows = self._shards[f"{MODEL}embedding.word.weight"].spec().shape[0]
        model = replace(config.model, padded_vocab_size=rows)  # old files don't say
        self.config = replace(config, parallel=parallel, model=model)
        found = facts_of(ranks)
        self.iteration = found["iteration"]
        self.facts = {
            "args": found["args"],
            "consumed_samples": found["consumed_train_samples"],
            "consumed_valid_samples": found["consumed_valid_samples"],
        }
        self._scheduler = found["opt_param_scheduler"]

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors of the model by native name, stage by stage."""
        return {key.removeprefix(MODEL): it.spec() for key, it in self._shards.items() if key.startswith(MODEL)}

    def moments(self) -> Mapping[str, TensorSpec]:
        """The optimizer's tensors; none, with a warning, where its state can't be read."""
        if not self._looked:
            self._looked = True
            try:
                self._shards |= _moments(self._ranks)
            except CheckpointError as error:
                _log.warning("the optimizer's state stays behind: %s", error)
        return {key: it.spec() for key, it in self._shards.items() if key.startswith(OPTIMIZER)}

    def training_facts(self) -> dict[str, Any]:
        """Steps, loss scaler and schedules."""
        return _optimizer_facts(self._ranks, self.iteration) | {"opt_param_scheduler": self._scheduler}

    def read(self, name: str) -> Tensor:
        """One whole tensor of the model, or (`optimizer/…`) of the optimizer."""
        joined = self._shards[name if name.startswith(OPTIMIZER) else MODEL + name]
        pieces = [read_span(path, tensor) for path, tensor in joined.pieces]
        if names.is_qkv(name) and self._ranks.version < 2:
            pieces = [reorder_qkv(self._ranks, piece) for piece in pieces]
        if joined.dim is None:
            if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
                self._say_unequal(name)
            return pieces[0]
        whole = torch.cat(pieces, joined.dim) if len(pieces) > 1 else pieces[0]
        if name == "embedding.word.weight":
            self._compare_copies(whole)
        return whole

    def tokenizer_files(self) -> list[Path]:
        """None: the format has no place for them."""
        return []

    def close(self) -> None:
        """Forget the files."""
        self._shards.clear()

    def _compare_copies(self, whole: Tensor) -> None:
        """The copies of the word embedding that later stages hold: the first stage's is taken."""
        for pieces in self._copies:
            begin = 0
            for path, tensor in pieces:
                if not torch.equal(read_span(path, tensor), whole[begin : begin + len(tensor)]):
                    self._say_unequal(names.TIED_COPY)
                    return
                begin += len(tensor)

    def _say_unequal(self, name: str) -> None:
        _log.warning("%s: copies that should be equal differ, the first is taken: %s", self._ranks.directory, name)


Pieces = tuple[tuple[Path, Tensor], ...]


def _shards(ranks: Ranks, stages: list[Stage], parts: Parts, prefix: str) -> tuple[dict[str, _Joined], list[Pieces]]:
    """State key -> its parts; and the copies of the word embedding."""
    shards: dict[str, _Joined] = {}
    copies: list[Pieces] = []
    for stage in stages:
        of_ranks = [parts[t, stage.rank, stage.chunk] for t in range(ranks.tp)]
        paths = [ranks.paths[t, stage.rank] for t in range(ranks.tp)]
        for legacy, pieces in _by_name(ranks, stage, of_ranks, paths):
            if legacy == names.TIED_COPY:
                copies.append(pieces)
            else:
                shards |= {prefix + name: it for name, it in _joined(ranks, stage, legacy, pieces).items()}
    return shards, copies


def _moments(ranks: Ranks) -> dict[str, _Joined]:
    """State key of each of the optimizer's tensors -> its parts. Raises CheckpointError where they can't be read."""
    if "optimizer" not in ranks.states[0, 0]:
        return {}
    refuse_sharded_optimizer(ranks)
    _optimizer_facts(ranks, 0)
    stages, parts = number_stages(ranks)
    found: dict[str, _Joined] = {}
    for kind, moments in optimizer_shards(ranks, stages, parts).items():
        found |= _shards(ranks, stages, moments, f"{OPTIMIZER}{kind}/")[0]
    return found


def _optimizer_facts(ranks: Ranks, iteration: int) -> dict[str, Any]:
    path = ranks.paths[0, 0]
    return optimizer_facts(read_legacy(path)["optimizer"], iteration, str(path))


def _by_name(
    ranks: Ranks, stage: Stage, of_ranks: list[dict[str, Tensor]], paths: list[Path]
) -> Iterator[tuple[str, Pieces]]:
    """Legacy name -> the parts of the tensor-parallel ranks."""
    if any(of_rank.keys() != of_ranks[0].keys() for of_rank in of_ranks):
        raise CheckpointError(f"{ranks.directory}: tensor-parallel ranks of stage {stage.rank} differ in names")
    for legacy in of_ranks[0]:
        yield legacy, tuple(zip(paths, (of_rank[legacy] for of_rank in of_ranks), strict=True))


def _joined(ranks: Ranks, stage: Stage, legacy: str, pieces: Pieces) -> dict[str, _Joined]:
    """One tensor of ours from its tensor-parallel parts; two from the stacked gate and up of a gated MLP."""
    name = names.native_name(legacy, stage.first_layer, stage.exits)
    if name is None:
        raise CheckpointError(f"{ranks.directory} holds {legacy}, which no early-exit GPT of these exits has")
    dim, first = names.split_dim(name), pieces[0][1]
    gated = names.is_up(name) and bool(ranks.args.get("swiglu"))
    same = all((tensor.shape, tensor.dtype) == (first.shape, first.dtype) for _, tensor in pieces)
    if not same or first.dim() <= (dim or 0) or (gated and first.shape[0] % 2):
        shapes = ", ".join(str(list(tensor.shape)) for _, tensor in pieces)
        raise CheckpointError(f"{ranks.directory}: the shards of {name} don't fit each other: {shapes}")
    if not gated:
        return {name: _Joined(pieces, dim)}

    def half(take: Callable[[Tensor], Tensor]) -> _Joined:
        return _Joined(tuple((path, take(tensor)) for path, tensor in pieces), dim)

    rows = first.shape[0] // 2
    return {names.gate_of(name): half(lambda tensor: tensor[:rows]), name: half(lambda tensor: tensor[rows:])}
