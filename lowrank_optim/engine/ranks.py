"""The ranks that matrices have where they are chosen as training goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..functional import compute_dtype
from ..parts.auto_rank import AutoRank, within
from ..parts.plan import Plan, Site, State
from ..settings import SettingError
from ..sharding.layout import Layout
from .update import init_state


def set_ranks(
    sites: list[tuple[Tensor, Site | None]],
    auto: AutoRank,
    budget: int | None,
    plan: Plan,
    states: Mapping[Any, State],
) -> None:
    """Set the ranks of matrices, whose largest is known: as their states have them, or the least.

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
