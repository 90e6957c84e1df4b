"""Where the parameters of a group stand: their sites, their names, and what they must not be."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .functional import compute_dtype
from .geometry import subspace_of
from .plan import Group, Plan, Shared, Site


class Entry(NamedTuple):
    """A parameter with its site, None where it is not projected, and its place in the optimizer.

    `group` is the place of its group, `place` its own in the group, `position` the one among all
    parameters, from 1.
    """

    param: Tensor
    site: Site | None
    group: int
    place: int
    position: int


def sites_of(group: Group, plan: Plan, shared: Shared) -> list[tuple[Tensor, Site | None]]:
    """Return the parameters of a group with their sites, None where not projected."""
    params: list[Tensor] = group["params"]
    rank, side, seed, gap = (group[key] for key in ("rank", "side", "seed", "update_proj_gap"))
    whole = plan.projector.whole
    spaces = [subspace_of(tuple(param.shape), rank, side, whole) for param in params]
    takes_turn = [
        space is not None and param.requires_grad
        for param, space in zip(params, spaces, strict=True)
    ]
    turn, turns = 0, max(1, sum(takes_turn))
    found: list[tuple[Tensor, Site | None]] = []
    for param, space, takes in zip(params, spaces, takes_turn, strict=True):
        site = None
        if space is not None:
            site = Site(
                rank=space[1],
                cols=space[0],
                dtype=compute_dtype(param.dtype),
                device=param.device,
                seed=seed,
                gap=gap,
                turn=turn,
                turns=turns,
                share=rank if isinstance(rank, float) else None,
                shared=shared,
            )
            turn += takes
        found.append((param, site))
    return found


def name_of(group: Group, index: int, place: int) -> str:
    """Return what to call a parameter in a message."""
    shape = tuple(group["params"][place].shape)
    names = group.get("param_names")
    if names is not None and place < len(names):
        return f"parameter {names[place]!r} of shape {shape}"
    return f"parameter {place} of group {index}, of shape {shape},"
