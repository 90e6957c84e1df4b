"""What a subspace is to the arithmetic: a basis, or a choice of columns.

A factor is a basis `(..., cols, rank)` with orthonormal columns, or `(rank,)` integers, which stand
for unit vectors: projecting is then indexing, and lifting is adding to columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .products import product, reach, transposed


def is_index(factor: Tensor) -> bool:
    """Return whether a factor is a choice of columns."""
    return not factor.is_floating_point()


def down(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `G P`, `(..., rows, cols)` to `(..., rows, rank)`, in `dtype`.

    On a CPU, where looking at the values costs no wait, they are cut off at `reach`, and a sum that
    overflows is made again of smaller numbers; a gradient that is not finite stays so.
    """
    low = _down(grad, factor, dtype)
    if low.device.type != "cpu" or not low.numel():
        return low
    least, most = low.aminmax()
    limit = reach(dtype)
    if -limit <= least and most <= limit:
        return low
    if not is_index(factor) and grad.dtype != torch.float16:
        share = 0.5 ** math.ceil(math.log2(grad.shape[-1]) / 2 + 1)
        low, limit = _down(grad, factor * share, dtype), limit * share
        return torch.where(low.isfinite(), low.clamp(-limit, limit) / share, low)
    return torch.where(low.isfinite(), low.clamp(-limit, limit), low)


def _down(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if is_index(factor):
        if transposed(grad):
            return grad.mT.index_select(-2, factor).mT.to(dtype).contiguous()
        return grad.index_select(-1, factor).to(dtype)
    return product(grad, factor, dtype)


def lift_(
    out: Tensor, low: Tensor, factor: Tensor, keep: float | Tensor = 1.0, scale: float = 1.0
) -> None:
    """Set `out` to `keep * out + scale * low P^T`, in place and without a temporary of its size.

    Args:
        out: `(..., rows, cols)`.
        low: `(..., rows, rank)`, in the dtype of `out`.
        factor: a basis or columns.
        keep: factor of what is there, a number or a 0-d tensor.
        scale: factor of what is added.
    """
    if isinstance(keep, Tensor) or is_index(factor):
        out.mul_(keep)
        keep = 1.0
    if is_index(factor):
        low = low.to(out.dtype)
        if transposed(out):
            out.mT.index_add_(-2, factor, low.mT, alpha=scale)
        else:
            out.index_add_(-1, factor, low, alpha=scale)
        return
    lifted = factor.mT.to(out.dtype)
    if out.ndim == 2:
        out.addmm_(low, lifted, beta=keep, alpha=scale)
    else:
        out.baddbmm_(low, lifted.expand(out.shape[0], -1, -1), beta=keep, alpha=scale)


def drop_(grad: Tensor, low: Tensor, factor: Tensor) -> Tensor:
    """Turn a copy of the gradient into what the projection drops, `G - R P^T`, in place."""
    if is_index(factor):
        return grad.mT.index_fill_(-2, factor, 0).mT
    lift_(grad, low, factor, scale=-1.0)
    return grad
