"""What a subspace is to the arithmetic: a basis, a choice of columns, or all of them.

A factor is a basis `(..., cols, rank)` with orthonormal columns, or `(rank,)` integers, which stand
for unit vectors: projecting is then indexing, and lifting is adding to columns. `UNIT` is the unit
matrix: both are then nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .products import product, transposed


class Unit:
    """The unit matrix."""


UNIT = Unit()
Factor = Tensor | Unit


def oriented(tensor: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Return the tensor as a matrix or stack, and its view with the projected axis last.

    `wide` says that the view is the transposed one, see `is_wide`.

    The first is a view of the tensor too, unless it is a convolution's weight whose strides do not
    allow that (channels last): then it is a copy.
    """
    matrix = tensor if tensor.ndim <= 3 else tensor.flatten(1)
    return matrix, matrix.mT if wide else matrix


def is_index(factor: Factor) -> bool:
    """Return whether a factor is a choice of columns."""
    return isinstance(factor, Tensor) and not factor.is_floating_point()


def down(grad: Tensor, factor: Factor, dtype: torch.dtype) -> Tensor:
    """Return `G P`, `(..., rows, cols)` to `(..., rows, rank)`, in `dtype`.

    On a CPU, where looking at the values costs no wait, they are cut off at `reach`, and a sum that
    overflows is made again of smaller numbers; a gradient that is not finite stays so. By `UNIT`
    the result may be the gradient itself.
    """
    return within_reach(_down(grad, factor, dtype), grad, factor)


def down_some(
    grads: Sequence[Tensor], factors: Sequence[Factor], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Return what `down` returns for several small gradients, looking at all values together."""
    lows = list(map(_down, grads, factors, dtypes))
    seen = [low for low in lows if low.device.type == "cpu" and low.numel()]
    if seen and len(set(dtypes)) == 1:
        least, most = torch.cat([low.reshape(-1) for low in seen]).aminmax()
        limit = reach(dtypes[0])
        if -limit <= least.item() and most.item() <= limit:
            return lows
    return list(map(within_reach, lows, grads, factors))


def within_reach(low: Tensor, grad: Tensor, factor: Factor) -> Tensor:
    """Return `G P`, finite wherever the row of G is finite, see `down`."""
    if low.device.type != "cpu" or not low.numel():
        return low
    dtype = low.dtype
    least, most = low.aminmax()
    limit = reach(dtype)
    if -limit <= least.item() and most.item() <= limit:
        return low
    if isinstance(factor, Tensor) and factor.is_floating_point() and grad.dtype != torch.float16:
        share = 0.5 ** math.ceil(math.log2(grad.shape[-1]) / 2 + 1)
        low, limit = _down(grad, factor * share, dtype), limit * share
        return torch.where(low.isfinite(), low.clamp(-limit, limit) / share, low)
    return torch.where(low.isfinite(), low.clamp(-limit, limit), low)


def _down(grad: Tensor, factor: Factor, dtype: torch.dtype) -> Tensor:
    if isinstance(factor, Unit):
        return grad.to(dtype)
    if factor.is_floating_point():
        if grad.dtype == factor.dtype == dtype:
            return grad @ factor
        return product(grad, factor, dtype)
    if transposed(grad):
        return grad.mT.index_select(-2, factor).mT.to(dtype).contiguous()
    return grad.index_select(-1, factor).to(dtype)


def lift_(
    out: Tensor, low: Tensor, factor: Factor, keep: float | Tensor = 1.0, scale: float = 1.0
) -> None:
    """Set `out` to `keep * out + scale * low P^T`, in place and without a temporary of its size.

    Args:
        out: `(..., rows, cols)`.
        low: `(..., rows, rank)`, in the dtype of `out`.
        factor: a basis, columns or `UNIT`.
        keep: factor of what is there, a number or a 0-d tensor.
        scale: factor of what is added.
    """
    if isinstance(keep, Tensor) or isinstance(factor, Unit) or not factor.is_floating_point():
        if isinstance(keep, Tensor) or keep != 1:
            out.mul_(keep)
        keep = 1.0
    if isinstance(factor, Unit):
        out.add_(low.to(out.dtype), alpha=scale)
    elif not factor.is_floating_point():
        low = low.to(out.dtype)
        if transposed(out):
            out.mT.index_add_(-2, factor, low.mT, alpha=scale)
        else:
            out.index_add_(-1, factor, low, alpha=scale)
    elif out.ndim == 2:
        out.addmm_(low, factor.mT.to(out.dtype), beta=keep, alpha=scale)
    else:
        lifted = factor.mT.to(out.dtype)
        out.baddbmm_(low, lifted.expand(out.shape[0], -1, -1), beta=keep, alpha=scale)


def drop_(grad: Tensor, low: Tensor, factor: Factor) -> Tensor:
    """Turn a copy of the gradient into what the projection drops, `G - R P^T`, in place."""
    if isinstance(factor, Unit):
        return grad.zero_()
    if not factor.is_floating_point():
        return grad.mT.index_fill_(-2, factor, 0).mT
    lift_(grad, low, factor, scale=-1.0)
    return grad


@cache
def reach(dtype: torch.dtype) -> float:
    """Return what gradients are cut off at: sums of some hundred of them stay finite.

    Squares overflow far below, which makes a step of AdamW's 0.
    """
    return torch.finfo(dtype).max / 1024
