"""How long an update is, and how long AdamW's would be: measured, and no matrix is formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .factors import Factor, Unit, drop_, is_index, lift_, reach
from .moments import adam, adam_some
from .products import compute_dtype, row_chunks, row_norms
from .steps import Norms
from .write import Coefficients, Several

GOLDEN = (math.sqrt(5) - 1) / 2


@cache
def stride_of(cols: int) -> int:
    """Return the columns between one entry of a sample and the next, without a common divisor.

    It is near the golden section of a row, so that successive entries spread over its columns.
    """
    stride = max(1, round(cols * GOLDEN))
    while math.gcd(stride, cols) != 1:
        stride += 1
    return stride


def sample_columns(
    rows: int, cols: int, width: int, first: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the columns of the entries of a sample, int64 `(rows, width)`, distinct in a row.

    Entry t of a matrix, `width` of them a row, lies in column `t stride mod cols`.

    Args:
        rows: number of rows that lie here.
        cols: number of columns of the matrix.
        width: entries a row.
        first: t of the first of them.
        device: of the result.
    """
    stride = stride_of(cols)
    start = first % cols * stride
    count = rows * width
    places = torch.arange(start, start + count * stride, stride, dtype=torch.int64, device=device)
    return places.remainder_(cols).view(rows, width)


def sample_moments(
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Update Adam's moments of a sample of entries, and return the sum of the squared directions.

    a = Adam(g) on the entries g of `sample_columns`, cut off at `reach`, see `moments.adam`; the
    result is sum a*a. An entry whose a is not finite counts as 0, so that it spoils no other one.

    Args:
        grads: K gradients `(..., rows, cols)` of one shape; matrices of a stack have the same
            entries.
        exp_avg, exp_avg_sq: K moments `(..., rows, width)`; modified in place.
        firsts: number of the first entry of each that lies here, see `sample_columns`.
        counts: K numbers of gradients seen, this one included.
        beta1, beta2, eps: as in `torch.optim.AdamW`.

    Returns:
        `(K, ...)`, one number a matrix, in the dtype of the moments.
    """
    *_, rows, cols = grads[0].shape
    entries = []
    for grad, moment, first in zip(grads, exp_avg, firsts, strict=True):
        columns = sample_columns(rows, cols, moment.shape[-1], first, grad.device)
        some, most = grad.gather(-1, columns.expand(moment.shape)), reach(moment.dtype)
        entries.append(some.to(moment.dtype).clamp(-most, most))
    alike = all(isinstance(count, int) and count == counts[0] for count in counts)
    if alike and len(entries) > 1:
        held = list(exp_avg), list(exp_avg_sq)
        directions = adam_some(entries, *held, counts[0], beta1, beta2, eps)
    else:
        moments = zip(entries, exp_avg, exp_avg_sq, counts, strict=True)
        directions = [adam(g, m, v, count, beta1, beta2, eps) for g, m, v, count in moments]
    finite = [direction.nan_to_num_(0.0, 0.0, 0.0) for direction in directions]
    return torch.stack([square_sum(direction) for direction in finite])


def squares_of(several: Several) -> Tensor:
    """Return the sum of squares of each of K matrices or stacks, `(K, ...)`."""
    if isinstance(several, Tensor):
        return square_sum(several)
    return torch.stack([square_sum(x) for x in several])


def square_sum(x: Tensor) -> Tensor:
    """Return the sum of squares of each matrix, `(..., rows, cols)` to `(...)`, in full dtype."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=compute_dtype(x.dtype))
    return norm.square()


def sign_squares(
    grads: Sequence[Tensor],
    factors: Sequence[Factor],
    low: Several,
    direction: Several | None,
    update: Coefficients,
) -> Tensor:
    """Return the squared norms of updates with a sign, as far as their rows lie here.

    |X|^2 with X = a N P^T + c sgn(G - R P^T), which is made again, some rows at a time.

    Args:
        grads, factors, low, direction, update: as in `lift_write`.

    Returns:
        `(K, ...)`, one number a matrix.
    """
    matrices = enumerate(zip(grads, factors, strict=True))
    return torch.stack(
        [
            signed_squares(grad, factor, low[k], direction, update, k, False)[..., 0]
            for k, (grad, factor) in matrices
        ]
    )


Signs = Callable[..., Tensor]
"""`sign_squares`, or a kernel that does the same."""


def update_squares(
    grads: Sequence[Tensor],
    factors: Sequence[Factor],
    low: Several | None,
    direction: Several | None,
    update: Coefficients,
    norms: Norms | None,
    signs: Signs = sign_squares,
) -> Tensor:
    """Return the squared norms of updates, as far as their rows lie here.

    U = X + t Y with X = a N P^T + c sgn(G - R P^T) and Y = b R P^T + phi G, where t is a factor of
    the matrix that is not known yet, see `Residual.limited`:

    |U|^2 = |X|^2 + 2 t <X, Y> + t^2 |Y|^2

    Columns of P are orthonormal and R = G P, so that without a sign norms and products of rows of
    N, R and G are enough; the sign of what a basis drops is made again, some rows at a time.

    Args:
        grads, factors, low, direction, update: as in `lift_write`.
        norms: row norms `(K, ..., rows, 1)`, if they are known.
        signs: who does updates with a sign and no Y.

    Returns:
        `(K, ..., 1)`, |X|^2, where b and phi are 0; else `(K, ..., 3)`, with <X, Y> and |Y|^2.
    """
    rest = has_rest(update)
    if update.sign and low is not None and not rest:
        return signs(grads, factors, low, direction, update)[..., None]
    if update.sign and low is not None:
        return torch.stack(
            [
                signed_squares(grad, factor, low[k], direction, update, k, True)
                for k, (grad, factor) in enumerate(zip(grads, factors, strict=True))
            ]
        )
    a = update.direction if direction is not None else 0.0
    if norms is not None:
        inside = (norms.direction * a).square().sum((-2, -1))
    elif a and direction is not None:
        inside = squares_of(direction) * a**2
    else:
        dtype = compute_dtype(grads[0].dtype)
        inside = torch.stack([grad.new_zeros(grad.shape[:-2], dtype=dtype) for grad in grads])
    if not rest:
        return inside[..., None]
    if norms is None:
        dtype = inside.dtype
        whole = torch.stack([row_norms(grad, dtype) for grad in grads])
        projected = torch.stack([row_norms(r, dtype) for r in low or ()])
    else:
        whole, projected = norms.grad, norms.low
    b, phi = update.low, update.grad
    g, r, q = weighted(whole, phi), weighted(projected, phi), weighted(projected, b)
    outside = g.square() + q * (q + 2 * r)
    mixed = torch.zeros_like(inside)
    if a and direction is not None and low is not None:
        inner = [
            (n * r).sum(-1, keepdim=True, dtype=inside.dtype)
            for n, r in zip(direction, low, strict=True)
        ]
        mixed = weighted(torch.stack(inner), b + phi).sum((-2, -1)) * a
    return torch.stack([inside, mixed, outside.sum((-2, -1))], -1)


def weighted(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return x times a factor, and 0 where the factor is 0: a row that overflows takes no part."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, factor * x)
    return factor * x if factor else torch.zeros_like(x)


def has_rest(update: Coefficients) -> bool:
    """Return whether an update has a part Y, see `update_squares`; values of tensors do not say."""
    return any(isinstance(x, Tensor) or x != 0 for x in (update.low, update.grad))


def signed_squares(
    grad: Tensor,
    factor: Factor,
    low: Tensor,
    direction: Several | None,
    update: Coefficients,
    k: int,
    rest: bool,
) -> Tensor:
    """Return |X|^2 of one matrix, or |X|^2, <X, Y> and |Y|^2, where X has a sign."""
    n = None if direction is None or not update.direction else direction[k]
    plain = isinstance(factor, Unit) or is_index(factor)
    rows, dtype = grad.shape[-2], compute_dtype(low.dtype)
    if plain and not rest:  # the sign is 0 in all columns that N is lifted to
        total = torch.zeros(grad.shape[:-2], dtype=dtype, device=grad.device)
        if not isinstance(factor, Unit):
            total += (nonzeros(grad) - nonzeros(low)) * update.sign**2
        if n is not None:
            total += square_sum(n) * update.direction**2
        return total[..., None]
    found = grad.new_zeros((*grad.shape[:-2], 3 if rest else 1), dtype=dtype)
    for chunk in row_chunks(rows, grad.numel() // max(1, rows)):
        part, inner = grad[..., chunk, :].to(dtype), low[..., chunk, :].to(dtype)
        x = drop_(part.clone(), inner, factor).sign_().mul_(update.sign)
        if n is not None:
            lift_(x, n[..., chunk, :].to(dtype), factor, scale=update.direction)
        pairs = [(x, x)]
        if rest:
            phi, b = (cut(each, k, chunk) for each in (update.grad, update.low))
            y = part * phi  # a float32 piece is the gradient itself
            lift_(y, inner * b, factor)
            pairs += [(x, y), (y, y)]
        found += torch.stack([(one * two).sum((-2, -1)) for one, two in pairs], -1)
    return found


def nonzeros(x: Tensor) -> Tensor:
    """Return how many values of each matrix are not 0, by the norm of signs: the fastest way."""
    rows = x.shape[-2]
    chunks = row_chunks(rows, x.numel() // max(1, rows))
    counts = [square_sum(x[..., chunk, :].sign()) for chunk in chunks]
    return sum(counts, torch.zeros(x.shape[:-2], device=x.device))


def form_sign(
    grad: Tensor, factor: Tensor, low: Tensor, direction: Tensor | None, update: Coefficients
) -> Tensor:
    """Return X / c of one matrix, for an update with a sign that is c, and without Y.

    Where it is small, it is measured and written as it is: that saves two products.
    """
    x = drop_(grad.to(low.dtype, copy=True), low, factor).sign_()
    if direction is not None and update.direction:
        lift_(x, direction, factor, scale=update.direction / update.sign)
    return x


def cut(factor: Tensor | float, k: int, chunk: slice) -> Tensor | float:
    """Return the factor of some rows of the k-th matrix."""
    return factor[k][..., chunk, :] if isinstance(factor, Tensor) else factor
