"""Products and norms that never widen a half-precision matrix as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements of a matrix that are widened or copied at once, where a temporary cannot be avoided."""

NEAR = 16
"""A piece of `CHUNK / NEAR` elements stays in a CPU's cache."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(rows: int, row_size: int) -> Iterator[slice]:
    """Yield slices of the rows that hold at most `CHUNK` elements each, and at least one row."""
    size = max(1, CHUNK // max(1, row_size))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def row_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the l2 norm of each row, `(..., rows, cols)` to `(..., rows, 1)`, in `dtype`.

    Squares are summed some rows at a time, in pieces that stay in a CPU's cache; of a transposed
    view, some columns at a time, which lie together there.
    """
    rows, cols = x.shape[-2:]
    if x.numel() <= CHUNK // NEAR:
        return x.to(dtype).square().sum(-1, keepdim=True).sqrt_()
    if transposed(x):
        total = torch.zeros(*x.shape[:-1], 1, dtype=dtype, device=x.device)
        for part in row_chunks(cols, NEAR * (x.numel() // max(1, cols))):
            total.squeeze(-1).add_(x[..., part].to(dtype).square().sum(-1))
        return total.sqrt_()
    norms = torch.empty(*x.shape[:-1], 1, dtype=dtype, device=x.device)
    for part in row_chunks(rows, NEAR * (x.numel() // max(1, rows))):
        norms[..., part, :] = x[..., part, :].to(dtype).square().sum(-1, keepdim=True)
    return norms.sqrt_()


def transposed(x: Tensor) -> bool:
    """Return whether the rows of a matrix lie side by side in memory, and not its columns."""
    return x.stride(-2) == 1 and x.stride(-1) != 1


def peaks(x: Tensor) -> Tensor:
    """Return the largest absolute value of each matrix, `(..., 1, 1)`; nan where one is."""
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-2], 1, 1)
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def inverse(x: Tensor) -> Tensor:
    """Return 1 / x, and 0 where x is less than the least normal number.

    Below it few digits of an average of squares are left, and the inverse may overflow: what is
    divided by it stands still there, as AdamW's weights do, whose eps is far above.
    """
    return torch.where(x >= torch.finfo(x.dtype).tiny, x.reciprocal(), 0)


def usable(peak: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Return whether matrices are finite, not all zero, and wanted: booleans, without a host sync.

    `peak` is the result of `peaks` for them.
    """
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
    rows = grad.shape[-2]
    low = torch.empty(*grad.shape[:-1], factor.shape[-1], dtype=dtype, device=grad.device)
    for part in row_chunks(rows, grad.numel() // max(1, rows)):
        low[..., part, :] = grad[..., part, :].to(dtype) @ factor.to(dtype)
    return low


def product_t(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `grad^T @ factor`, as `product` does: `(..., rows, k)` to `(..., cols, k)`."""
    if grad.dtype != torch.float16:
        return (grad.mT @ factor.to(grad.dtype)).to(dtype)
    (rows, cols), k = grad.shape[-2:], factor.shape[-1]
    total = torch.zeros(*grad.shape[:-2], cols, k, dtype=dtype, device=grad.device)
    for part in row_chunks(rows, grad.numel() // max(1, rows)):
        total += grad[..., part, :].mT.to(dtype) @ factor[..., part, :].to(dtype)
    return total
