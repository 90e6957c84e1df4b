"""The update of a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .products import compute_dtype, row_chunks
from .rounding import round_into_


def lift_write(
    param: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    decay: float | Tensor,
    low: Tensor | None,
    row_scale: Tensor | float | None,
    sign: float,
    projected: Tensor | None,
    lift_: Callable[[Tensor, Tensor], None],
    rng: torch.Generator | None = None,
) -> None:
    """Apply an update to a weight in place, without a full-size temporary.

    W <- decay * W + step_size * (low P^T + row_scale * G + sign * sgn(G - g P^T))

    The sum is made in float32 (float64 for float64) and rounded once; what has to be widened or
    copied for that is at most `CHUNK` elements at a time.

    Args:
        param: `(..., rows, cols)`, a view of the weight; modified in place.
        grad: same shape.
        step_size: `-lr`, or `+lr` to maximise; a number or a 0-d tensor.
        decay: `1 - lr * weight_decay`; likewise.
        low: `(..., rows, rank)` or None.
        row_scale: `(..., rows, 1)`, a number, or None.
        sign: factor of the sign term; 0 leaves it out.
        projected: g, `(..., rows, rank)`; used by the sign term only.
        lift_: `lift_(out, low)` adds `low P^T` to `out` in place.
        rng: round stochastically with this (bfloat16 weights only); None rounds to nearest.
    """
    dtype = compute_dtype(param.dtype)
    wide = param.dtype == dtype
    scaled_low = None if low is None else low * step_size
    factor = None if row_scale is None else row_scale * step_size
    rows, row_size = param.shape[-2], param.numel() // max(1, param.shape[-2])
    chunks = [slice(0, rows)] if wide and sign == 0 else row_chunks(rows, row_size)
    for chunk in chunks:
        target = param[..., chunk, :]
        out = target if wide else target.to(dtype)
        out.mul_(decay)
        if scaled_low is not None:
            lift_(out, scaled_low[..., chunk, :])
        if factor is not None:
            part = factor[..., chunk, :] if isinstance(factor, Tensor) and factor.ndim else factor
            add_scaled_(out, grad[..., chunk, :].to(dtype), part)
        if sign and projected is not None:
            dropped = grad[..., chunk, :].to(dtype, copy=True)
            lift_(dropped, -projected[..., chunk, :])
            out.add_(dropped.sign_().mul_(sign * step_size))
        round_into_(target, out, rng)


def add_scaled_(out: Tensor, x: Tensor, factor: Tensor | float) -> None:
    """Add `factor * x` to `out` in place; the factor is a number or broadcasts to `x`."""
    if isinstance(factor, Tensor):
        out.addcmul_(x, factor.to(out.device))
    else:
        out.add_(x, alpha=factor)
