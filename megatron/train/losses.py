"""The losses of a step as every rank sees them: gathered over pipeline stages, averaged over data-parallel ranks."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from megatron.exits.loss import LossTerms
from megatron.model.partition import StageSpec
from megatron.parallel.mesh import Mesh
from megatron.schedule.actions import Op
from megatron.schedule.execute import Key, Plan

Shares = dict[str, list[float]]
"""By head label: what each microbatch adds to the step's mean."""


def gather_losses(
    mesh: Mesh,
    stages: Sequence[StageSpec],
    plan: Plan,
    terms: Mapping[Key, LossTerms],
    dynamic: frozenset[str],
) -> tuple[Shares, Shares]:
    """Losses of all heads, and mean confidences of those with `dynamic` weights; the same on every rank.

    stages: of the whole model. terms: of this rank's stages. One transfer to the host, after one sum over the ranks.
    """
    scored = _scored(plan)
    rows = [(label, key) for stage in stages for label in stage.heads for key in scored[stage.index]]
    certain = [(label, key) for label, key in rows if label in dynamic]
    mine = [terms[key].loss[label] if key in terms else None for label, key in rows]
    mine += [terms[key].confidence[label] if key in terms else None for label, key in certain]
    table = _sum_over_ranks(mesh, mine)
    return _by_label(rows, table), _by_label(certain, table[len(rows) :])


def _scored(plan: Plan) -> dict[int, list[Key]]:
    """By stage: the microbatches for which its heads run, in order."""
    keys = sorted((a.stage, a.microbatch) for rank in plan.schedule for a in rank if a.op is Op.HEADS)
    return {stage: list(group) for stage, group in groupby(keys, itemgetter(0))}


def _sum_over_ranks(mesh: Mesh, mine: Sequence[Tensor | None]) -> list[float]:
    """Numbers of which each tp group knows some, as all ranks then know them; means over data-parallel ranks."""
    known = [place for place, value in enumerate(mine) if value is not None]
    table = torch.zeros(len(mine), dtype=torch.float64, device=mesh.backend.device)
    if known and mesh.rank("tp") == 0:
        table[known] = torch.stack([mine[place] for place in known]).double()
    return (mesh.sum(table) / mesh.size("dp")).tolist()


def _by_label(rows: Sequence[tuple[str, Key]], values: Sequence[float]) -> Shares:
    found: Shares = {}
    for (label, _), value in zip(rows, values, strict=False):
        found.setdefault(label, []).append(value)
    return {label: [value / len(column) for value in column] for label, column in found.items()}
