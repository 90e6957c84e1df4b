"""Refreshes at which ranks change: more columns are learnt, and some are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..functional import down, row_norms
from ..parts.auto_rank import AutoRank, gather_columns, largest, rank_of, smallest
from ..parts.plan import Group, Matrix, Plan, State


def widened(matrix: Matrix, plan: Plan) -> Matrix:
    """Return a matrix whose subspace has room for the largest rank; its state changes.

    What it had stands first. It may have had more, where others share its budget since.
    """
    _, state, site = matrix
    assert site.most is not None
    wide = replace(site, rank=site.most)
    for key in plan.projector.keys:
        held: Tensor = state[key]
        batch = tuple(held.shape[: -2 if held.is_floating_point() else -1])
        fresh: Tensor = plan.projector.init(batch, held.dtype, wide)[key]
        if held.is_floating_point():
            kept = min(site.most, held.shape[-1])
            fresh[..., :kept].copy_(held[..., :kept])
        state[key] = fresh
    return matrix._replace(site=wide)


def narrow(
    matrices: Sequence[Matrix],
    learnt: Sequence[State],
    before: Sequence[State],
    group: Group,
    plan: Plan,
) -> list[int]:
    """Choose ranks and keep as many of the columns that were learnt; return the ranks.

    Waits for the device once. A matrix without a usable gradient keeps what it had; on "meta",
    without values, all keep the largest rank.

    Args:
        matrices: of one shape, with room for the largest rank.
        learnt: their subspaces.
        before: what they had; in place of it, in `learnt` and in the state, comes what is kept.
        group, plan: theirs.
    """
    auto = rank_of(group["rank"])
    assert isinstance(auto, AutoRank)
    site = matrices[0].site
    assert site.most is not None
    least = min(auto.bounds(site.cols)[0], site.most)  # fewer are learnt where there are fewer rows
    numbers = []
    for matrix, own in zip(matrices, learnt, strict=True):
        low = down(matrix.grad, plan.projector.factor(own, site), site.dtype)
        energies = low.square_().sum(-2)
        total = row_norms(matrix.grad, site.dtype).square_().sum(-2)
        numbers.append(torch.cat([energies, total], -1))
    summed = site.team.sum_(torch.stack(numbers))
    energies, total = summed[..., :-1], summed[..., -1]
    wanted = torch.where(total > 0, smallest(energies, total, auto.share), 0)
    wanted = torch.where(summed.isfinite().all(-1), wanted, 0)
    wanted = pad(wanted.flatten(1) if wanted.ndim > 1 else wanted.unsqueeze(1), (0, 1)).amax(-1)
    wanted = site.layout.stack_team.max_(wanted)
    chosen = [site.rank] * len(learnt) if wanted.is_meta else wanted.tolist()
    ranks = []
    for place, (rank, own, old) in enumerate(zip(chosen, learnt, before, strict=True)):
        best = largest(energies[place], max(least, int(rank)))
        for key in plan.projector.keys:
            own[key] = gather_columns(own[key], best) if rank else old[key]
            matrices[place].state[key] = own[key]
        ranks.append(own[plan.projector.keys[0]].shape[-1])
    return ranks
