"""Sites: which parameters of a group are projected, along which axis and to what rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import compute_dtype
from ..parts.checks import SettingError
from ..parts.plan import Plan
from ..parts.rank import AutoRank, rank_asked, subspace_of, width_of
from ..parts.types import Group, Shared, Site, State
from ..sharding.layout import Layout, layout_of
from .adaptive_rank import set_ranks
from .members import Member


class Entry(NamedTuple):
    """A parameter with its site, None where it is not projected, and its place in the optimizer.

    `layout` says what this process holds of it, `group` is the place of its group, `place` its own
    in the group, `position` the one among all parameters, from 1, `member` what is known of it.
    """

    param: Tensor
    site: Site | None
    layout: Layout
    group: int
    place: int
    position: int
    member: Member


def sites_of(
    group: Group,
    plan: Plan,
    shared: Shared,
    copies: Any = None,
    states: Mapping[Any, State] | None = None,
) -> list[tuple[Tensor, Site | None]]:
    """Return the parameters of a group with their sites, None where not projected.

    Args:
        group, plan: of the parameters.
        shared: tensors common to several.
        copies: the process group whose members hold the same ordinary tensors; None without one.
        states: by parameter, for ranks that are chosen as training goes; without a state the rank
            is the least.
    """
    params: list[Tensor] = group["params"]
    rank = rank_asked(group)
    side, seed, gap = (group[key] for key in ("side", "seed", "update_proj_gap"))
    whole = plan.projector.whole
    rule = (rank, side, whole, plan.full, group["min_dim"])
    spaces = [subspace_of(tuple(param.shape), *rule) for param in params]
    takes_turn = [
        space is not None and param.requires_grad
        for param, space in zip(params, spaces, strict=True)
    ]
    turn, turns = 0, max(1, sum(takes_turn))
    found: list[tuple[Tensor, Site | None]] = []
    for place, (param, space, takes) in enumerate(zip(params, spaces, takes_turn, strict=True)):
        site = None
        if space is not None and rank is not None:
            try:
                layout = layout_of(param, side, False, copies)
            except ValueError as error:
                raise SettingError(
                    f"parameter {place} of shape {tuple(param.shape)} of its group: {error}"
                ) from None
            width = min(width_of(rank, layout.cols, whole), layout.cols)
            if plan.projector.bases:
                width = min(width, layout.rows)  # a gradient has no more directions
            site = Site(
                rank=width,
                cols=layout.cols,
                dtype=compute_dtype(param.dtype),
                device=param.device,
                seed=seed,
                gap=gap,
                turn=turn,
                turns=turns,
                share=rank if isinstance(rank, float) else None,
                shared=shared,
                layout=layout,
            )
            turn += takes
        found.append((param, site))
    if isinstance(rank, AutoRank):
        set_ranks(found, rank, group["state_budget"], plan, states or {})
    return found


def plain_layout(param: Tensor, group: Group, plan: Plan) -> Layout:
    """Return the layout of a parameter that is not projected.

    Its step goes element by element, unless values of a row share a scale or are rounded with bits
    that go by row: then rows are whole.
    """
    rounds = group["stochastic_rounding"] and param.dtype == torch.bfloat16
    exact = rounds or group["state_dtype"] in ("8bit", "bfloat16")
    return layout_of(param, None, exact)
