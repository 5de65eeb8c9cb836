"""Reads checkpoints of Megatron-LM and EE-LLM, of any tensor- and pipeline-parallel layout, into a RunState.

Names of tensors come from legacy_names.py, files from the restricted reader in safe.py: nothing in a file runs.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import legacy_names as names
from megatron.checkpoint.find import LEGACY_FILE, MEGATRON, RANK_DIRECTORY
from megatron.checkpoint.legacy_facts import json_able, optimizer_facts, scheduler_facts
from megatron.checkpoint.legacy_optimizer import optimizer_parts
from megatron.checkpoint.safe import read_legacy
from megatron.checkpoint.state import MODEL, OPTIMIZER, PADDING, RunState
from megatron.checkpoint.typed import count, mapping, number, sequence
from megatron.errors import CheckpointError
from megatron.logs import get_logger

SHARDED_OPTIMIZER = "distrib_optim.pt"

_log = get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """A run of layers in one pipeline rank: a whole rank, or one of its chunks in an interleaved pipeline."""

    rank: int
    chunk: int
    first_layer: int
    exits: tuple[int, ...]  # exit numbers (from 1) that live here, in the order of --exit-layer-nums


@dataclass(frozen=True)
class Ranks:
    """The files of one checkpoint: `states[tp, pp]` is the content of a rank's file."""

    directory: Path
    args: dict[str, Any]
    tp: int
    pp: int
    states: dict[tuple[int, int], dict[str, Any]]
    paths: dict[tuple[int, int], Path]

    @property
    def given(self) -> dict[str, Any]:
        """The arguments without those that are None, which says no more than being absent."""
        return {name: value for name, value in self.args.items() if value is not None}

    @property
    def version(self) -> float:
        """Version of the format, which says how QKV rows are ordered; 0 where the file names none."""
        state = self.states[0, 0]
        return float(number(state, "checkpoint_version", str(self.directory))) if "checkpoint_version" in state else 0.0

    def count(self, name: str) -> int | None:
        """An argument that is a whole number; None where there is none."""
        given = self.given
        return count(given, name, f"{self.directory}, args") if name in given else None

    @property
    def exits(self) -> list[int]:
        """--exit-layer-nums in its order, numbers from 1."""
        where, given = f"{self.directory}, args", self.given
        numbers = sequence(given, "exit_layer_nums", where) if "exit_layer_nums" in given else ()
        return [count({"exit_layer_nums": each}, "exit_layer_nums", where) for each in numbers]


def read(directory: Path, vocab_size: int | None = None, with_optimizer: bool = True) -> RunState:
    """Read `iter_*/` or `release/` with all its `mp_rank_*` directories.

    `vocab_size` is the number of ids the tokenizer has: rows beyond it become `<name>.padding`; without it all rows
    stay in `<name>`. Tensors may be mapped from the files, so keep these while they are in use. Facts: format,
    iteration, checkpoint_version, args, consumed_train_samples, consumed_valid_samples, optimizer_step,
    opt_param_scheduler, grad_scaler (null where the file has none, or one that lacks keys: a warning says so). Facts
    of the optimizer are null without it. Random states are not taken over.

    Raises:
        CheckpointError: a rank's file is missing, damaged or hostile; tensors are missing, unknown or do not fit
            each other; the optimizer's state is sharded or belongs to other parameters; a field has an odd type.
    """
    ranks = open_ranks(directory)
    if with_optimizer:
        refuse_sharded_optimizer(ranks)
    stages, parts = number_stages(ranks)
    merged = _merge(ranks, stages, parts, MODEL)
    facts = facts_of(ranks)
    if with_optimizer and "optimizer" in ranks.states[0, 0]:
        for kind, moments in optimizer_shards(ranks, stages, parts).items():
            merged |= _merge(ranks, stages, moments, f"{OPTIMIZER}{kind}/")
        facts |= optimizer_facts(ranks.states[0, 0]["optimizer"], facts["iteration"], str(directory))
    tensors = merged if vocab_size is None else _split_vocabulary(merged, vocab_size, directory)
    return RunState(tensors, facts)


def read_args(directory: Path) -> dict[str, Any]:
    """The arguments a checkpoint was written with, as JSON-able data. Errors as for `read`."""
    return open_ranks(directory).args


def open_ranks(directory: Path, data: bool = True) -> Ranks:
    """Read every rank's file; the first says how many there must be.

    Without `data` tensors come as `read_legacy` gives them then. Errors as for `read`.
    """
    there = {match.groups(): path for path in directory.iterdir() if (match := RANK_DIRECTORY.fullmatch(path.name))}
    if any(expert is not None for _, _, expert in there):
        raise CheckpointError(f"{directory} holds a mixture of experts, which is not supported")
    paths = {(int(tp), int(pp or 0)): path / LEGACY_FILE for (tp, pp, _), path in there.items()}
    if (0, 0) not in paths:
        raise CheckpointError(f"{directory} lacks mp_rank_00 or mp_rank_00_000: copy the whole checkpoint")
    if len(paths) < len(there):
        raise CheckpointError(f"{directory} mixes mp_rank_TT and mp_rank_TT_PPP: remove those that don't belong")
    first = read_legacy(paths[0, 0])
    args = json_able(first.get("args", {}), str(paths[0, 0]))
    if not isinstance(args, dict):
        raise CheckpointError(f"{paths[0, 0]}: its arguments are no namespace")
    where = f"{directory}, args"
    tp = _parallel_size(args, "tensor_model_parallel_size", 1 + max(tp for tp, _ in paths), where)
    pp = _parallel_size(args, "pipeline_model_parallel_size", 1 + max(pp for _, pp in paths), where)
    needed = [(t, p) for t in range(tp) for p in range(pp)]
    missing = [key for key in needed if key not in paths or not paths[key].is_file()]
    if missing:
        listed = ", ".join(f"mp_rank_{t:02d}_{p:03d}" if pp > 1 else f"mp_rank_{t:02d}" for t, p in missing[:8])
        mend = "copy the whole checkpoint"
        if args.get("tune_exit"):
            mend = "tuning exits writes the first stages only: copy the others from the checkpoint it started from"
        raise CheckpointError(f"{directory} (tp={tp} pp={pp}) lacks {listed}: {mend}")
    if data:
        states = {key: first if key == (0, 0) else read_legacy(paths[key]) for key in needed}
    else:
        states = {key: read_legacy(paths[key], data=False) for key in needed}
        states[0, 0] |= {name: value for name, value in first.items() if not name.startswith(("model", "optimizer"))}
    ranks = Ranks(directory, args, tp, pp, states, {key: paths[key] for key in needed})
    _check_one_iteration(ranks)
    return ranks


def _check_one_iteration(ranks: Ranks) -> None:
    """Files of several saves make no model."""
    said = {path: ranks.states[key].get("iteration") for key, path in ranks.paths.items()}
    found = {path: count(ranks.states[key], "iteration", str(path)) for key, path in ranks.paths.items() if said[path]}
    if len(set(found.values())) > 1:
        (first, one), (other, two) = min(found.items(), key=lambda it: it[1]), max(found.items(), key=lambda it: it[1])
        raise CheckpointError(
            f"{ranks.directory} mixes iterations: {first.parent.name} is of {one}, {other.parent.name} of {two}: "
            "copy the whole checkpoint"
        )


def _parallel_size(args: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """What the arguments say; the oldest files say nothing, and the directories must do."""
    if args.get(name) is None:
        return default
    size = count(args, name, where)
    if not 1 <= size <= 10_000:
        raise CheckpointError(f"{where}: {name} is {size}, not 1 to 10000: the checkpoint is damaged")
    return size


Parts = dict[tuple[int, int, int], dict[str, Tensor]]
"""(tp rank, pp rank, chunk) -> legacy name -> shard, in the order of the file."""


def number_stages(ranks: Ranks) -> tuple[list[Stage], Parts]:
    """Number the layers over all stages, chunk by chunk, and name every shard."""
    parts: Parts = {}
    chunks = _chunks(ranks)
    for (t, p), state in ranks.states.items():
        for chunk, key in enumerate(chunks):
            where = f"{ranks.directory}, tp rank {t}, pp rank {p}"
            parts[t, p, chunk] = names.flatten(mapping(state, key, where), where)
    stages, first, numbers = [], 0, ranks.exits
    for chunk in range(len(chunks)):
        for p in range(ranks.pp):
            layers = len(names.layer_numbers(parts[0, p, chunk]))
            exits = tuple(n for n in numbers if first < n <= first + layers)
            stages.append(Stage(p, chunk, first, exits))
            first += layers
    expected = ranks.count("num_layers")
    if expected is not None and expected != first:
        raise CheckpointError(f"{ranks.directory} holds {first} layers, its arguments say {expected}")
    return stages, parts


def _chunks(ranks: Ranks) -> list[str]:
    """Keys of the model's chunks, in every file the same: "model", or "model0", "model1", … if interleaved."""
    first = ranks.states[0, 0]
    if "model" in first:
        return ["model"]
    numbered = list(itertools.takewhile(first.__contains__, map("model{}".format, itertools.count())))
    if not numbered:
        raise CheckpointError(f"{ranks.directory}: the file of tp rank 0, pp rank 0 holds no model")
    return numbered


def _merge(ranks: Ranks, stages: list[Stage], parts: Parts, prefix: str) -> dict[str, Tensor]:
    """Join the shards of all ranks under our names; copies of the tied embedding are compared and dropped."""
    merged: dict[str, Tensor] = {}
    copies: list[Tensor] = []
    unequal: list[str] = []
    for stage in stages:
        shards = [parts[t, stage.rank, stage.chunk] for t in range(ranks.tp)]
        if any(shard.keys() != shards[0].keys() for shard in shards):
            raise CheckpointError(f"{ranks.directory}: tensor-parallel ranks of stage {stage.rank} differ in names")
        for legacy in shards[0]:
            pieces = [shard[legacy] for shard in shards]
            if legacy == names.TIED_COPY:
                copies.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
                continue
            ours = names.native_name(legacy, stage.first_layer, stage.exits)
            if ours is None:
                raise CheckpointError(f"{ranks.directory} holds {legacy}, which no early-exit GPT of these exits has")
            merged |= {f"{prefix}{name}": tensor for name, tensor in _join(ranks, ours, pieces, unequal).items()}
    tied = merged.get(f"{prefix}embedding.word.weight")
    if any(tied is None or not torch.equal(copy, tied) for copy in copies):
        unequal.append("word_embeddings_for_head.weight")
    if unequal:
        shown = ", ".join(unequal[:8])
        _log.warning("%s: copies that should be equal differ, the first is taken: %s%s", ranks.directory, prefix, shown)
    return merged


def _join(ranks: Ranks, name: str, pieces: list[Tensor], unequal: list[str]) -> dict[str, Tensor]:
    """One tensor from its tensor-parallel shards; two from the stacked gate and up of a gated MLP."""
    dim = names.split_dim(name)
    gated = names.is_up(name) and bool(ranks.args.get("swiglu"))
    shape = pieces[0].shape
    if any(piece.shape != shape for piece in pieces) or len(shape) <= (dim or 0) or (gated and shape[0] % 2):
        shapes = ", ".join(str(list(piece.shape)) for piece in pieces)
        raise CheckpointError(f"{ranks.directory}: the shards of {name} don't fit each other: {shapes}")
    if names.is_qkv(name) and ranks.version < 2:
        pieces = [reorder_qkv(ranks, piece) for piece in pieces]
    if dim is None:
        if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
            unequal.append(name)
        return {name: pieces[0]}
    if gated:
        gates, ups = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return {names.gate_of(name): torch.cat(gates), name: torch.cat(ups)}
    return {name: torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]}


def reorder_qkv(ranks: Ranks, piece: Tensor) -> Tensor:
    """Rows of formats before 2.0, [3, heads, head] in 0 and [heads, head, 3] in 1, as [heads, 3, head]."""
    heads = ranks.count("num_attention_heads")
    if not heads or heads % ranks.tp or piece.shape[0] % (3 * heads // ranks.tp):
        raise CheckpointError(
            f"{ranks.directory}: --num-attention-heads is needed to order the rows of this old format"
        )
    heads, rest = heads // ranks.tp, piece.shape[1:]
    if ranks.version < 1:
        return piece.reshape(3, heads, -1, *rest).transpose(0, 1).reshape(piece.shape)
    return piece.reshape(heads, -1, 3, *rest).transpose(1, 2).reshape(piece.shape)


def optimizer_shards(ranks: Ranks, stages: list[Stage], parts: Parts) -> dict[str, Parts]:
    """Kind of moment -> shards under the names of their parameters."""
    kinds: dict[str, Parts] = {}
    early_exit = bool(ranks.exits)
    for (t, p), state in ranks.states.items():
        chunks = sorted(stage.chunk for stage in stages if stage.rank == p)
        parameters = {(chunk, name): tensor for chunk in chunks for name, tensor in parts[t, p, chunk].items()}
        where = f"{ranks.directory}, tp rank {t}, pp rank {p}"
        found = optimizer_parts(
            state.get("optimizer"), parameters, early_exit, bool(ranks.args.get("tune_exit")), where
        )
        for kind, tensors in found.items():
            shards = kinds.setdefault(kind, {key: {} for key in parts})
            for (chunk, name), tensor in tensors.items():
                shards[t, p, chunk][name] = tensor
    return kinds


def refuse_sharded_optimizer(ranks: Ranks) -> None:
    if any(ranks.directory.glob(f"mp_rank_*/{SHARDED_OPTIMIZER}")):
        raise CheckpointError(
            f"{ranks.directory}: the optimizer's state lies in {SHARDED_OPTIMIZER}, written by Megatron's distributed "
            "optimizer, whose shards are not read. Give --no-load-optim or --finetune to take the weights alone"
        )


def _split_vocabulary(tensors: Mapping[str, Tensor], vocab_size: int, directory: Path) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not names.has_vocabulary(name):
            split[name] = tensor
            continue
        rows = tensor.shape[0]
        if rows < vocab_size:
            raise CheckpointError(
                f"{directory}: {name} has {rows} rows, the tokenizer {vocab_size} ids: give the checkpoint's tokenizer"
            )
        split[name] = tensor[:vocab_size]
        if rows > vocab_size:
            split[f"{name}{PADDING}"] = tensor[vocab_size:]
    return split


def facts_of(ranks: Ranks) -> dict[str, Any]:
    """What the first rank's file says beside tensors; facts of the optimizer are null."""
    state, where = ranks.states[0, 0], str(ranks.directory)
    iteration = count(state, "iteration", where) if "iteration" in state else 0
    samples = ranks.count("consumed_train_samples")
    if samples is None:  # a file older than the count of samples, when batches were fixed
        samples = iteration * (ranks.count("global_batch_size") or 0)
    return {
        "format": MEGATRON,
        "iteration": iteration,
        "checkpoint_version": ranks.version,
        "args": ranks.args,
        "consumed_train_samples": samples,
        "consumed_valid_samples": ranks.count("consumed_valid_samples") or 0,
        "opt_param_scheduler": scheduler_facts(state.get("opt_param_scheduler"), where),
        "optimizer_step": None,
        "grad_scaler": None,
    }
