"""Norms of gradients, of which a process may hold a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import compute_dtype
from ..sharding.collectives import Team
from ..sharding.layout import Layout


class Norm(NamedTuple):
    """The Euclidean norm of what is held of a gradient, and how that lies on processes."""

    held: Tensor
    layout: Layout


def norm_of(grad: Tensor, layout: Layout) -> Norm:
    """Return the norm of what is held of a gradient, at least in float32."""
    return Norm(torch.linalg.vector_norm(grad, dtype=compute_dtype(grad.dtype)), layout)


def total_norm(norms: list[Norm]) -> Tensor | None:
    """Return the norm of all gradients, on all processes; None without gradients.

    One sum over processes for all gradients that are cut in the same way.
    """
    if not norms:
        return None
    home = norms[0].held.device
    by_team: dict[Team, list[Tensor]] = {}
    for norm in norms:
        by_team.setdefault(norm.layout.holders, []).append(norm.held.to(home))
    wholes = []
    for team, parts in by_team.items():
        whole = torch.linalg.vector_norm(torch.stack(parts)) if parts[1:] else parts[0]
        wholes.append(team.sum_(whole.square()).sqrt() if team.groups else whole)
    total: Tensor = torch.linalg.vector_norm(torch.stack(wholes)) if wholes[1:] else wholes[0]
    return total
