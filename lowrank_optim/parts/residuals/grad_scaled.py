"""APOLLO's residual: the whole gradient, scaled by row or matrix, with the norm limiter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional import Norms, Want
from ..limiter import first_norm, limit
from ..types import Group, Site, State, Update
from ._base import Limited
from ._norms import measured, phi_of


@dataclass(frozen=True)
class GradScaled(Limited):
    """APOLLO: the whole gradient, scaled by what the rule did inside the subspace.

    update = phi * G,  phi_i = sqrt(k) |N_i| / (|R_i| + 1e-8), one factor a row or one a matrix,
    with |phi * G|_F limited to `limiter` times its value of the step before (measured before bias
    correction).  phi is 0 where a norm overflows.

    Args:
        limiter: largest growth of the norm in one step; None for no limit.
        per: "row", "tensor" (APOLLO-Mini), or "auto": a tensor at rank 1, else a row.

    Raises:
        ValueError: an unknown `per`, or a limiter below 1.

    Reference: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270.
        The paper projects with a Gaussian of variance 1/rank; ours is orthonormal, which makes R
        smaller and phi larger by sqrt(cols / rank): at scale 1 the step is as long as AdamW's.
        `scale = rank / cols` gives the paper's length. The first norm has a bound too, see
        `limiter.FIRST`.
    """

    limiter: float | None = 1.01
    per: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("auto", "row", "tensor"):
            raise ValueError(f'per must be "auto", "row" or "tensor", got {self.per!r}')

    @property
    def want(self) -> Want:
        """Norms alone: there is no lift."""
        return Want(low=False, direction=False)

    def sums(self, norms: Norms | None, state: State, site: Site, group: Group) -> Tensor | None:
        """Return |phi * G|^2 for factors of rows, else |G|^2, |R|^2 and |N|^2 of each matrix."""
        assert norms is not None
        if self._by_matrix(site):
            return torch.cat([part.square().sum(-2) for part in norms], dim=-1)
        if group["limiter"] is None:
            return None
        scale: float = group["scale"]
        norms = measured(norms)
        return (phi_of(norms) * norms.grad).square_().sum(-2) * scale

    def update(self, norms: Norms | None, state: State, site: Site, group: Group) -> Update:
        """Return phi of each row as the factor of G; of a matrix 1, which `limited` makes phi."""
        assert norms is not None
        if self._by_matrix(site):
            return Update(grad=torch.ones_like(norms.grad))
        return Update(grad=math.sqrt(group["scale"]) * phi_of(measured(norms)))

    def limited(
        self, sums: Tensor, state: State, site: Site, group: Group, uncorrected: float | Tensor
    ) -> Tensor | float:
        """Return the factor of phi; phi itself, limited, where it is one of a matrix."""
        root = math.sqrt(group["scale"])
        first = root * first_norm(site) * uncorrected
        if not self._by_matrix(site):
            return limit(sums[..., 0].sqrt() * uncorrected, state, group["limiter"], first)
        whole = measured(Norms(*sums.sqrt().unbind(-1)))
        factor = root * phi_of(whole)
        norm = factor * whole.grad * uncorrected
        return factor[..., None, None] * limit(norm, state, group["limiter"], first)

    def _by_matrix(self, site: Site) -> bool:
        return self.per == "tensor" or (self.per == "auto" and site.rank == 1)
