"""What keeps the norm of an update from growing fast: one number a matrix, on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import is_real
from .plan import Site, State


def limit(
    norm: Tensor, state: State, growth: float | None, key: str = "residual_norm"
) -> Tensor | float:
    """Return the factor that keeps a norm from growing faster than `growth` a step.

    s > growth * s_prev gives growth * s_prev / s, else 1; s_prev becomes the limited norm, in
    place. It starts as infinity (the first step is never limited), and a norm that is zero or not
    finite leaves it alone: a step without gradient must not stop all later ones.
    """
    if growth is None:
        return 1.0
    before: Tensor = state[key]
    ceiling = growth * before
    finite = norm < math.inf
    factor = torch.where(finite & (norm > ceiling), ceiling / norm, 1.0)
    before.copy_(torch.where(finite & (norm > 0), torch.minimum(norm, ceiling), before))
    return factor[..., None, None].to(norm.dtype)


def limiter_state(
    batch: tuple[int, ...], site: Site, growth: float | None, key: str = "residual_norm"
) -> State:
    """Return the state of `limit`: one number a matrix, or nothing without a limiter."""
    if growth is None:
        return {}
    return {key: torch.full(batch, math.inf, dtype=site.dtype, device=site.device)}


def check_limiter(growth: float | None) -> None:
    """Raise ValueError unless `growth` is None or a number of at least 1."""
    if growth is None:
        return
    if not is_real(growth) or not growth >= 1:
        raise ValueError(f"limiter must be None or a number of at least 1, got {growth!r}")
