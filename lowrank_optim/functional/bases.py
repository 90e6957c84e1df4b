"""Orthonormal bases: Gram matrices, orthonormalisation, signs, and the cosine basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .products import row_chunks
from .rounding import upload

PARTS = 8
"""A basis is widened to float64 in pieces of `CHUNK / PARTS` elements (4 MiB)."""


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
    return upload(basis.to(dtype), device)


def canonical_signs(basis: Tensor) -> Tensor:
    """Return the basis with each column's entry of largest absolute value made positive.

    A decomposition leaves the signs open; kept moments would depend on the library that chose them.
    """
    peak = basis.abs().argmax(dim=-2, keepdim=True)
    return torch.where(basis.gather(-2, peak) < 0, -basis, basis)


def gram(x: Tensor) -> Tensor:
    """Return `x^T x` in float64, `(..., rows, cols)` to `(..., cols, cols)`.

    The rows are widened some at a time, so that the sum is exact to float64's rounding and no
    full-size copy is made. On a CPU the result for a matrix does not depend on its company.
    """
    rows, cols = x.shape[-2:]
    total = torch.zeros(*x.shape[:-2], cols, cols, dtype=torch.float64, device=x.device)
    if x.ndim > 2 and x.device.type == "cpu":
        for square, part in zip(total, x, strict=True):
            square.copy_(gram(part))
        return total
    for part in row_chunks(rows, PARTS * (x.numel() // max(1, rows))):
        wide = x[..., part, :].to(torch.float64)
        total += wide.mT @ wide
    return total


def orthonormal_(x: Tensor, passes: int = 2) -> None:
    """Make the columns of each matrix orthonormal in place, by shifted Cholesky QR in float64.

    d = diag(X^T X)^-1/2,  L L^T = d X^T X d + s I,  X <- X d L^-T;  s = 0 after the first pass

    Column j stays in the span of the columns up to j, on its own side of the others. It is
    products, except a Cholesky decomposition and a triangular inverse of `(..., rank, rank)`, and
    waits for no device. The shift s keeps the decomposition from failing where columns are nearly
    dependent. One pass leaves X well conditioned; after two X^T X = I to the dtype's rounding, for
    condition numbers up to about 1e10 of X with columns of unit length. A matrix that is not finite
    gives one that is not.

    Args:
        x: `(..., cols, rank)`, float32 or float64, rank <= cols; columns that are not zero.
        passes: 1 for a well-conditioned basis of the span, 2 for an orthonormal one.

    Reference: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR for
        computing the QR factorization of ill-conditioned matrices", arXiv 1809.11085.
    """
    if x.ndim > 2 and x.device.type == "cpu":
        for part in x:
            orthonormal_(part, passes)
        return
    cols, rank = x.shape[-2:]
    limits = torch.finfo(torch.float64)
    eye = torch.eye(rank, dtype=torch.float64, device=x.device)
    for number in range(passes):
        square = gram(x)
        size = square.diagonal(dim1=-2, dim2=-1).clamp_min(limits.tiny).rsqrt()
        square.mul_(size.unsqueeze(-1)).mul_(size.unsqueeze(-2))
        if number == 0:
            square.diagonal(dim1=-2, dim2=-1).add_(16 * limits.eps * rank**1.5)
        lower = torch.linalg.cholesky_ex(square).L
        del square
        inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
        del lower
        factor = inverse.mul_(size.unsqueeze(-2)).mT
        for part in row_chunks(cols, PARTS * (x.numel() // max(1, cols))):
            x[..., part, :] = (x[..., part, :].to(torch.float64) @ factor).to(x.dtype)
