"""Ranks that are chosen as training goes: within a budget, and changed at a refresh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..functional import compute_dtype, down, row_norms
from ..parts.checks import SettingError
from ..parts.plan import Plan
from ..parts.rank import AutoRank, rank_asked
from ..parts.types import Group, Matrix, Site, State
from ..sharding.layout import Layout
from .state import init_state

STEPS = 1024
"""A budget becomes a share of all axes, which is a multiple of one over this."""


def smallest(energies: Tensor, total: Tensor, share: float) -> Tensor:
    """Return how many of the largest energies make up a share of the total, of each matrix.

    Args:
        energies: `(..., k)`, of any order.
        total: `(...)`; the energies may add up to less.
        share: in (0, 1].

    Returns:
        `(...)` integers from 1 to k; k where even all of them are too few.
    """
    sums = energies.sort(-1, descending=True).values.cumsum(-1)
    short = (sums < share * total.unsqueeze(-1)).sum(-1) + 1
    return short.clamp(max=energies.shape[-1])


def largest(energies: Tensor, count: int) -> Tensor:
    """Return the places of the largest energies `(..., count)`, in ascending order."""
    return energies.topk(count, dim=-1).indices.sort(-1).values


def within(
    bounds: Sequence[tuple[int, int]],
    cols: Sequence[int],
    bytes_at: Callable[[Sequence[int]], int],
    budget: int,
) -> list[int]:
    """Return the largest ranks that a budget allows some matrices: one share of all axes.

    Args:
        bounds: least and largest rank of each matrix.
        cols: lengths of their projected axes.
        bytes_at: state bytes of all of them at some ranks.
        budget: bytes.

    Raises:
        ValueError: the least ranks take more.
    """

    def ranks(step: int) -> list[int]:
        shares = (step * axis // STEPS for axis in cols)
        return [min(most, max(least, r)) for (least, most), r in zip(bounds, shares, strict=True)]

    if (need := bytes_at(ranks(0))) > budget:
        raise ValueError(f"the least ranks take {need} bytes of state, the budget is {budget}")
    good, bad = 0, STEPS + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if bytes_at(ranks(middle)) <= budget else (good, middle)
    return ranks(good)


def gather_columns(basis: Tensor, places: Tensor) -> Tensor:
    """Return columns of a basis `(..., cols, k)`, or entries of a choice of columns `(..., k)`."""
    if not basis.is_floating_point():
        return basis.gather(-1, places)
    index = places.unsqueeze(-2).expand(*basis.shape[:-1], places.shape[-1])
    return basis.gather(-1, index)


def padded(state: Tensor, width: int, far: int) -> Tensor:
    """Return a basis with zero columns appended, or a choice with columns that do not exist.

    Args:
        state: `(..., cols, k)`, or integers `(..., k)`.
        width: columns of the result.
        far: a number above all columns, here and in other choices.
    """
    more = width - state.shape[-1]
    if state.is_floating_point():
        return torch.nn.functional.pad(state, (0, more))
    beyond = torch.arange(far, far + more, device=state.device)
    return torch.cat([state, beyond.expand(*state.shape[:-1], -1)], -1)


def set_ranks(
    sites: list[tuple[Tensor, Site | None]],
    auto: AutoRank,
    budget: int | None,
    plan: Plan,
    states: Mapping[Any, State],
) -> None:
    """Set the rank of each matrix: the rank that its state has, or the least where it has no state.

    Raises:
        SettingError: the least ranks take more than `state_budget`.
    """
    for _, site in sites:
        if site is not None:
            site.most = site.rank
    trained = [(x, site) for x, site in sites if site is not None and x.requires_grad]
    if budget is not None:
        kinds = tuple((tuple(x.shape), x.dtype, site.layout.wide) for x, site in trained)
        bounds = tuple((min(auto.bounds(s.cols)[0], s.rank), s.rank) for _, s in trained)
        try:
            ranks = budgeted(kinds, bounds, tuple(site.cols for _, site in trained), plan, budget)
        except ValueError as error:
            raise SettingError(f"state_budget={budget}: {error}") from None
        for (_, site), most in zip(trained, ranks, strict=True):
            site.most = most
    for param, site in sites:
        if site is not None and site.most is not None:
            state = states.get(param)
            least = min(auto.bounds(site.cols)[0], site.most)
            site.rank = rank_in(state, plan) if state else least


def rank_in(state: State, plan: Plan) -> int:
    """Return the rank that a state has; 0 if it lacks a subspace."""
    subspace = state.get(plan.projector.keys[0])
    return int(subspace.shape[-1]) if isinstance(subspace, Tensor) and subspace.ndim else 0


@lru_cache(maxsize=64)
def budgeted(
    kinds: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...],
    bounds: tuple[tuple[int, int], ...],
    cols: tuple[int, ...],
    plan: Plan,
    budget: int,
) -> list[int]:
    """Return the largest ranks of matrices of some shapes, dtypes and views; see `within`."""

    def bytes_at(ranks: Sequence[int]) -> int:
        return sum(
            size_of(*kind, axis, rank, plan)
            for kind, axis, rank in zip(kinds, cols, ranks, strict=True)
        )

    return within(bounds, cols, bytes_at, budget)


@lru_cache(maxsize=65536)
def size_of(
    shape: tuple[int, ...], dtype: torch.dtype, wide: bool, cols: int, rank: int, plan: Plan
) -> int:
    """Return the bytes of the state of a matrix at a rank."""
    meta = torch.device("meta")
    site = Site(rank, cols, compute_dtype(dtype), meta, layout=Layout(shape, wide, 0))
    param = torch.empty(shape, dtype=dtype, device=meta)
    state = init_state(param, site, {"capturable": False}, plan)
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def widened(matrix: Matrix, plan: Plan) -> Matrix:
    """Return a matrix whose subspace has room for the largest rank; its state changes.

    Its old columns come first. It may have had more, if other matrices share its budget since.
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
        before: the subspaces that they had. What is kept replaces them in `learnt` and in states.
        group, plan: of the matrices.
    """
    auto = rank_asked(group)
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
