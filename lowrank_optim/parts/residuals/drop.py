"""GaLore's residual: the dropped part stays dropped."""

from __future__ import annotations

from dataclasses import dataclass

from ...functional import Norms, Want
from ..types import Group, Site, State, Update
from ._base import Stateless


@dataclass(frozen=True)
class Drop(Stateless):
    """Nothing: the update stays in the subspace. A = k N.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507.
    """

    @property
    def want(self) -> Want:
        """The direction alone."""
        return Want(low=False, norms=False)

    def update(self, norms: Norms | None, state: State, site: Site, group: Group) -> Update:
        """Return k as the factor of N."""
        return Update(direction=group["scale"])
