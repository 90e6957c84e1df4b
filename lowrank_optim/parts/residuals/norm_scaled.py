"""Fira's residual: the dropped part, scaled row by row, with the norm limiter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional import Norms, Want
from ..limiter import first_norm, limit
from ..types import Group, Site, State, Update
from ._base import Limited
from ._norms import measured, phi_of


@dataclass(frozen=True)
class NormScaled(Limited):
    """Fira: keep the rest, scaled row by row by what the rule did inside the subspace.

    S = phi * (G - c R P^T),  phi_i = |N_i| / (|R_i| + 1e-8),  update = k N P^T + S, with |S|_F
    limited to `limiter` times its value of the step before. c = k in the authors' code, whose
    numbers are the published ones (`form="code"`), and 1 in the paper (`form="paper"`).
    |S|_F comes from row norms alone: |G_i - c R_i P^T|^2 = |G_i|^2 - (2c - c^2) |R_i|^2, where a
    difference below rounding noise is 0. It is measured before bias correction, as in the authors'
    code.  A row whose norm overflows has phi 0. The limiter is `parts/limiter.py`; the base
    `Limited` declares its number, keeps its norm, and checks it.

    Args:
        limiter: largest growth of the norm in one step; None for no limit.
        form: "code" or "paper".

    Raises:
        ValueError: an unknown form, or a limiter below 1.

    Reference: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
        Constraint?", arXiv 2410.01623. Unlike the authors' code, a zero norm is not remembered, and
        the first one has a bound too, see `limiter.FIRST`.
    """

    limiter: float | None = 1.01
    form: str = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("code", "paper"):
            raise ValueError(f'form must be "code" or "paper", got {self.form!r}')

    @property
    def want(self) -> Want:
        """Everything."""
        return Want()

    def sums(self, norms: Norms | None, state: State, site: Site, group: Group) -> Tensor | None:
        """Return |S|^2, one number a matrix, before bias correction is taken out of it."""
        if group["limiter"] is None:
            return None
        assert norms is not None
        kept, norms = self._kept(group), measured(norms)
        phi = phi_of(norms)
        whole_row, low = (phi * norms.grad).square_(), phi * norms.low
        dropped = whole_row.addcmul(low, low, value=kept**2 - 2 * kept)
        noise = whole_row.mul_(16 * torch.finfo(dropped.dtype).eps)
        return dropped.masked_fill_(dropped < noise, 0).sum(-2)

    def update(self, norms: Norms | None, state: State, site: Site, group: Group) -> Update:
        """Return the factors k of N, phi of G and -c phi of R."""
        assert norms is not None
        phi = phi_of(measured(norms))
        return Update(direction=group["scale"], low=phi * -self._kept(group), grad=phi)

    def limited(
        self, sums: Tensor, state: State, site: Site, group: Group, uncorrected: float | Tensor
    ) -> Tensor | float:
        """Return the factor of S, by |S|."""
        norm, first = sums[..., 0].sqrt() * uncorrected, first_norm(site) * uncorrected
        return limit(norm, state, group["limiter"], first)

    def _kept(self, group: Group) -> float:
        return float(group["scale"]) if self.form == "code" else 1.0
