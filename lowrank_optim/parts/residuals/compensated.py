"""Alice's residual: the dropped part with its rows brought to one length, and a limiter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import Norms, Want, inverse
from ..kinds import NOT_NEGATIVE, Kind
from ..limiter import first_norm, limit
from ..numbers import Number
from ..types import Group, Site, State, Update
from ._base import Limited

NOISE = 2.0**-8
"""Share of a row's energy that a bfloat16 product may get wrong."""


@dataclass(frozen=True)
class Compensated(Limited):
    """Alice: keep the rest, each row divided by the average length that it has there.

    p_i <- beta p_i + (1-beta) e_i,  e_i = |G_i|^2 - |R_i|^2
    C_i = sqrt(cols - rank) (G - R P^T)_i / sqrt(p_i),  update = k (N P^T + factor C)

    with |C|_F limited to `limiter` times its value of the step before. p starts at the first e. A
    difference counts as 1/256 of |G_i|^2 at least: below that it is what bfloat16 products leave,
    and no length to divide by. C_i is 0 where |G_i|^2 overflows, or p_i is below the least normal
    number.

    Args:
        factor: the paper's alpha_c, `compensation` of a group.
        beta: decay of p, in [0, 1).
        limiter: largest growth of the norm in one step; None for no limit.

    Raises:
        ValueError: a value out of its range.

    Reference: Gong, Scetbon, Ma, Meeds, "Towards Efficient Optimizer Design for LLM via Structured
        Fisher Approximation with a Low-Rank Extension", arXiv 2502.07752. There p starts at 0, and
        no difference is too small.
    """

    factor: float = 0.4
    beta: float = 0.9
    limiter: float | None = 1.01
    kinds: ClassVar[Mapping[str, Kind]] = {**Limited.kinds, "residual_sq": NOT_NEGATIVE}
    numbers: ClassVar[Mapping[str, Number]] = {
        **Limited.numbers,
        "compensation": Number.factor("factor", also=("factor",)),
        "beta": Number.decay("beta"),
    }

    @property
    def want(self) -> Want:
        """Everything."""
        return Want()

    @property
    def row_keys(self) -> tuple[str, ...]:
        """p."""
        return ("residual_sq",)

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return p of each row, and the norm of each matrix."""
        p = torch.zeros((*batch, rows, 1), dtype=site.dtype, device=site.device)
        return {"residual_sq": p, **super().init(batch, rows, site)}

    def sums(self, norms: Norms | None, state: State, site: Site, group: Group) -> Tensor | None:
        """Return |C|^2 of each matrix; p in place."""
        assert norms is not None
        most = torch.finfo(site.dtype).max
        whole_row = norms.grad.square().clamp_(max=most)
        energy = (whole_row - norms.low.square()).clamp_min_(0)
        counted = torch.maximum(energy, whole_row * NOISE)
        p: Tensor = state["residual_sq"]
        p.copy_(torch.where(p == 0, counted, p.lerp(counted, 1 - group["beta"])))
        if group["limiter"] is None:
            return None
        return (energy * self._inverse(p, norms)).sum(-2) * (site.cols - site.rank)

    def update(self, norms: Norms | None, state: State, site: Site, group: Group) -> Update:
        """Return the factors k of N, c_i of G and -c_i of R."""
        assert norms is not None
        scale = group["scale"] * group["compensation"]
        rest = self._inverse(state["residual_sq"], norms).sqrt_()
        rest.mul_(scale * math.sqrt(site.cols - site.rank))
        return Update(direction=group["scale"], low=-rest, grad=rest)

    def limited(
        self, sums: Tensor, state: State, site: Site, group: Group, uncorrected: float | Tensor
    ) -> Tensor | float:
        """Return the factor of c, by |C|."""
        return limit(sums[..., 0].sqrt(), state, group["limiter"], first_norm(site))

    def _inverse(self, p: Tensor, norms: Norms) -> Tensor:
        """Return 1 / p, and 0 in rows whose C is 0."""
        return inverse(p).masked_fill_(norms.grad.square().isinf(), 0)
