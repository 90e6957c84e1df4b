"""RACS's rule: rows and columns are scaled, and nothing else is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import inverse
from ...sharding.collectives import Team
from ..kinds import NORM, NOT_NEGATIVE, Kind
from ..limiter import first_norm, limit, limiter_state
from ..numbers import Number, check_numbers
from ..types import Group, Job, Site, State, site_of
from ._matrix import OfMatrices, zeros

OUTLYING = 10.0
"""Where the values of a first step are cut off; with Gaussian gradients they stay below."""


@dataclass(frozen=True)
class RowColumnScaled(OfMatrices):
    """The gradient, divided by the root of a rank-one estimate of its squares.

    `iterations` times  s <- (G*G)^T q / |q|^2,  q <- (G*G) s / |s|^2,  from q = 1;
    Q <- beta Q + (1-beta) q,  S <- beta S + (1-beta) s;  N_ij = G_ij / sqrt(Q_i S_j)

    with |N|_F limited to `limiter` times its value of the step before. Squares are cut off so
    that a sum of rows * cols of them is finite.

    Args:
        beta: decay of both vectors, in [0, 1).
        iterations: at least 1.
        limiter: largest growth of the norm in one step; None for no limit.

    Raises:
        ValueError: a value out of its range.

    Reference: Gong, Scetbon, Ma, Meeds, "Towards Efficient Optimizer Design for LLM via Structured
        Fisher Approximation with a Low-Rank Extension", arXiv 2502.07752 (RACS). Q and S start at
        their first value instead of 0, which makes the first step as long as the others. That step
        is cut off at 10 a value and has a largest norm too, see `limiter.FIRST`: beside one outlier
        the estimate of the other squares is next to 0.
    """

    beta: float = 0.9
    iterations: int = 5
    limiter: float | None = 1.01
    unprojected: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ("column_scale", "update_norm")
    row_keys: ClassVar[tuple[str, ...]] = ("row_scale",)
    kinds: ClassVar[Mapping[str, Kind]] = {
        "column_scale": NOT_NEGATIVE,
        "row_scale": NOT_NEGATIVE,
        "update_norm": NORM,
    }
    numbers: ClassVar[Mapping[str, Number]] = {
        "beta": Number.decay("beta"),
        "iterations": Number.count("iterations"),
        "limiter": Number.growth("limiter"),
    }

    def __post_init__(self) -> None:
        check_numbers(self)

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return Q of the rows that are held, S, and the norm of each matrix."""
        return {
            "row_scale": zeros((*batch, rows, 1), site),
            "column_scale": zeros((*batch, 1, site.cols), site),
            **limiter_state(batch, site, 1.0, "update_norm"),
        }

    def complete(
        self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group
    ) -> list[Tensor]:
        """Return N of each matrix; the state of each job in place."""
        team, site = jobs[0].layout.team, site_of(jobs[0])
        grads = torch.stack(list(directions))
        most = torch.finfo(site.dtype).max / (site.layout.rows * site.layout.cols)
        rows, columns = rank_one(grads.square().clamp_(max=most), group["iterations"], team)
        row_scale = self._averaged("row_scale", rows, jobs, group["beta"])
        column_scale = self._averaged("column_scale", columns, jobs, group["beta"])
        grads = grads * inverse(row_scale).sqrt_() * inverse(column_scale).sqrt_()
        if (limiter := group["limiter"]) is not None:
            before = torch.stack([job.state["update_norm"] for job in jobs])
            bound = torch.where(before < math.inf, math.inf, OUTLYING)[..., None, None]
            grads.clamp_(-bound, bound)
            norm = team.sum_(grads.square().sum((-2, -1))).sqrt_()
            held = {"update_norm": before}
            grads *= limit(norm, held, limiter, first_norm(site), "update_norm")
            for job, value in zip(jobs, before.unbind(), strict=True):
                job.state["update_norm"].copy_(value)
        return list(grads.unbind())

    def _averaged(self, key: str, new: Tensor, jobs: Sequence[Job], beta: float) -> Tensor:
        """Return the averages of the jobs with a new value in them, in place."""
        held = torch.stack([job.state[key] for job in jobs])
        held = torch.where(held == 0, new, held.lerp(new, 1 - beta))
        for job, value in zip(jobs, held.unbind(), strict=True):
            job.state[key].copy_(value)
        return held


def rank_one(squares: Tensor, iterations: int, team: Team) -> tuple[Tensor, Tensor]:
    """Return q `(..., rows, 1)` and s `(..., 1, cols)` with q s nearest to positive squares.

    That is their first singular pair, by alternating least squares: one sum over processes each.
    """
    rows = torch.ones_like(squares[..., :1])
    columns = squares[..., :1, :]
    for _ in range(iterations):
        parts = torch.cat([rows.mT @ squares, rows.square().sum(-2, keepdim=True)], -1)
        parts = team.sum_(parts)
        columns = divided(parts[..., :-1], parts[..., -1:])
        size = columns.amax(-1, keepdim=True)
        unit = divided(columns, size)
        rows = divided(divided(squares @ unit.mT, size), unit.square().sum(-1, keepdim=True))
    return rows, columns


def divided(x: Tensor, by: Tensor) -> Tensor:
    """Return x / by, and 0 where that is 0 / 0."""
    return torch.where(by > 0, x / by, 0)
