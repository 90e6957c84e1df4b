"""The operations of the optimizers in plain torch, written to be read.

Every operation that may get a kernel has its reference here. Matrices are seen with the projected
axis last: `param` and `grad` are `(..., rows, cols)`, `low` is `(..., rows, rank)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements of a matrix that are widened or copied at once, where a temporary cannot be avoided."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Return a generator that is a function of some non-negative numbers and of nothing else."""
    seed = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(seed) >> 1)


def row_chunks(rows: int, row_size: int) -> Iterator[slice]:
    """Yield slices of the rows that hold at most `CHUNK` elements each, and at least one row."""
    size = max(1, CHUNK // max(1, row_size))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def row_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the l2 norm of each row, `(..., rows, cols)` to `(..., rows, 1)`, in `dtype`."""
    if x.dtype == dtype:
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norms
    parts = [
        torch.linalg.vector_norm(x[..., rows, :].to(dtype), dim=-1, keepdim=True)
        for rows in row_chunks(x.shape[-2], x.numel() // max(1, x.shape[-2]))
    ]
    return torch.cat(parts, dim=-2)


def peaks(x: Tensor) -> Tensor:
    """Return the largest absolute value of each matrix, `(..., 1, 1)`; nan where one is."""
    peak: Tensor = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
    return peak


def usable(grad: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Return `(..., 1, 1)` booleans, without a host sync: finite, not all zero, and wanted?"""
    peak = peaks(grad)
    good = peak.isfinite() & (peak > 0)
    return good if wanted is None else good & wanted


def product(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `grad @ factor` in `dtype`, without widening a half-precision gradient whole.

    bfloat16 is multiplied as it is, and summed in float32; float16, whose sums would overflow, is
    widened some rows at a time.

    Args:
        grad: `(..., rows, cols)`.
        factor: `(..., cols, k)`.
        dtype: of the arithmetic.
    """
    if grad.dtype != torch.float16:
        return (grad @ factor.to(grad.dtype)).to(dtype)
    chunks = row_chunks(grad.shape[-2], grad.numel() // grad.shape[-2])
    return torch.cat([grad[..., rows, :].to(dtype) @ factor.to(dtype) for rows in chunks], dim=-2)


def product_t(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `grad^T @ factor`, as `product` does: `(..., rows, k)` to `(..., cols, k)`."""
    if grad.dtype != torch.float16:
        return (grad.mT @ factor.to(grad.dtype)).to(dtype)
    chunks = row_chunks(grad.shape[-2], grad.numel() // grad.shape[-2])
    parts = [grad[..., rows, :].mT.to(dtype) @ factor[..., rows, :].to(dtype) for rows in chunks]
    return torch.stack(parts).sum(0)


def adam_moments(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Update Adam's moments in place and return the bias-corrected direction.

    M <- b1 M + (1-b1) g,  V <- b2 V + (1-b2) g*g,
    N = (M / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps)

    Args:
        grad: any shape, in the dtype of the moments.
        exp_avg, exp_avg_sq: same shape; modified in place.
        count: t, the number of gradients seen, this one included.
        beta1, beta2, eps: as in `torch.optim.AdamW`.
    """
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**count)).add_(eps)
    return (exp_avg / denominator).div_(1 - beta1**count)


def rotate_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, rotation: Tensor, count: int, beta1: float, beta2: float
) -> None:
    """Carry Adam's moments into a new basis, in place: exact for M, an estimate for V.

    With Q = P_old^T P_new, t gradients seen, m = M / (1-b1^t) and v = V / (1-b2^t):
    M <- M Q,  V <- (1-b2^t) |(v - m*m) (Q*Q) + (m Q)^2|
    that is, the variance is carried as if the coordinates were uncorrelated.

    Args:
        exp_avg, exp_avg_sq: `(..., rows, rank)`; modified in place.
        rotation: `(..., rank, rank)`.
        count: t, at least 1.
        beta1, beta2: as in `torch.optim.AdamW`.

    Reference: Robert, Safaryan, Modoranu, Alistarh, "LDAdam: Adaptive Optimization from
        Low-Dimensional Gradient Statistics", arXiv 2410.16103.
    """
    correction1, correction2 = 1 - beta1**count, 1 - beta2**count
    mean = exp_avg / correction1
    variance = (exp_avg_sq / correction2).addcmul_(mean, mean, value=-1)
    mean = mean @ rotation
    exp_avg.copy_(mean * correction1)
    second = (variance @ rotation.square()).addcmul_(mean, mean)
    exp_avg_sq.copy_(second.abs_().mul_(correction2))


def select_moment(moment: Tensor, old: Tensor, new: Tensor) -> None:
    """Carry a moment between two subsets of one basis, in place.

    The columns of indices that stay are copied, those of new indices become zero: the product
    with the 0/1 matrix `P_old^T P_new`, without the product.

    Args:
        moment: `(..., rows, rank)`; modified in place.
        old, new: `(..., rank)` integers, sorted and distinct; may lack leading axes of `moment`.
    """
    place = torch.searchsorted(old, new).clamp_(max=old.shape[-1] - 1)
    stays = old.gather(-1, place) == new
    columns = place.unsqueeze(-2).expand(moment.shape)
    moment.copy_(moment.gather(-1, columns).mul_(stays.unsqueeze(-2)))


def dct_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II basis `(n, n)`; column k is the k-th cosine.

    Q[j, k] = c_k cos(pi (2j+1) k / (2n)),  c_0 = sqrt(1/n), else sqrt(2/n)

    Made in float64 from `(2j+1) k mod 4n`, which keeps the argument of the cosine small.
    """
    k = torch.arange(n, dtype=torch.int64, device="cpu")
    j = k.unsqueeze(1)
    phase = ((2 * j + 1) * k).remainder_(4 * n)
    basis = torch.cos(phase.to(torch.float64) * (math.pi / (2 * n))).mul_(math.sqrt(2 / n))
    basis[:, 0] = math.sqrt(1 / n)
    return basis.to(device=device, dtype=dtype)


def canonical_signs(basis: Tensor) -> Tensor:
    """Return the basis with each column's entry of largest absolute value made positive.

    A decomposition leaves the signs open; kept moments would depend on the library that chose them.
    """
    peak = basis.abs().argmax(dim=-2, keepdim=True)
    return torch.where(basis.gather(-2, peak) < 0, -basis, basis)


def stochastic_round(x: Tensor, rng: torch.Generator) -> Tensor:
    """Round to bfloat16 up or down at random, so that the expectation is the (float32) value.

    Sixteen random bits are added below the bits that stay, and the rest is cut off. Values that are
    not finite are rounded as usual.
    """
    x = x.to(torch.float32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=rng)
    bits = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


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


def round_into_(target: Tensor, value: Tensor, rng: torch.Generator | None) -> None:
    """Write `value` into `target`, rounding stochastically with `rng`; nothing if they are one."""
    if rng is not None:
        target.copy_(stochastic_round(value, rng))
    elif target is not value:
        target.copy_(value)
