"""The limiter: it keeps the norm of an update from growing fast, by one number a matrix.

Its users are the residuals on the base `Limited`, which are `NormScaled` (Fira), `GradScaled`
(APOLLO) and `Compensated` (Alice), and the rule `RowColumnScaled` (RACS).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import Site, State

FIRST = 3.0
"""How many times longer than an AdamW step, of length one a weight, the first update may be.

Gaussian gradients give 0.2 to 2.4 times with each of the methods, in shapes from 9x9 to 256x64; one
entry a million times the others gave RACS a million.
"""


def limit(
    norm: Tensor,
    state: State,
    growth: float | None,
    first: float | Tensor = math.inf,
    key: str = "residual_norm",
) -> Tensor | float:
    """Return the factor that keeps a norm from growing faster than `growth` a step.

    s > growth * s_prev gives growth * s_prev / s, else 1. s_prev becomes the limited norm, in
    place. s_prev starts as infinity, which stands for a largest norm of `first`. A norm s that is
    zero or not finite leaves s_prev alone: a step without gradient must not stop all later ones. A
    norm that overflows gives 0, as an average of squares that overflows does in AdamW.
    """
    if growth is None:
        return 1.0
    before: Tensor = state[key]
    ceiling = torch.where(before < math.inf, growth * before, first)
    factor = torch.where(norm > ceiling, ceiling / norm, 1.0)
    used = (norm > 0) & (norm < math.inf)
    before.copy_(torch.where(used, torch.minimum(norm, ceiling), before))
    return factor[..., None, None].to(norm.dtype)


def first_norm(site: Site) -> float:
    """Return the bound of the first norm of a matrix: `FIRST` times the norm of ones."""
    return FIRST * math.sqrt(site.layout.rows * site.layout.cols)


def limiter_state(
    batch: tuple[int, ...], site: Site, growth: float | None, key: str = "residual_norm"
) -> State:
    """Return the state of `limit`: one number a matrix, or nothing without a limiter."""
    if growth is None:
        return {}
    return {key: torch.full(batch, math.inf, dtype=site.dtype, device=site.device)}
