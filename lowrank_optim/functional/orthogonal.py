"""The orthogonal factor of matrices, by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""The published coefficients: singular values go near 1 fast, and never to 1."""

TINY = 1e-7
"""Added to a norm that is divided by; a zero matrix gives zero."""


def newton_schulz(x: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return nearly U V^T of each matrix U S V^T.

    X <- X / (|X|_F + 1e-7), then `iterations` times
    A = X^T X,  X <- X (a I + b A + c A^2),  (a, b, c) = (3.4445, -4.7750, 2.0315)

    Five iterations bring singular values from 0.01 of |X|_F on to between 0.68 and 1.14, from
    0.0025 on to between 0.68 and 1.21; smaller ones stay smaller. The products are of the shorter
    axis: 4 m n^2 + 2 n^3 flops an iteration, for m rows and n columns, m >= n.

    Args:
        x: `(..., m, n)`.
        iterations: at least 1.
        dtype: of the products: bfloat16, as published, or x's own.

    Returns:
        `(..., m, n)` in the dtype of x.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/; Bernstein, Newhouse, "Old Optimizer, New Norm:
        An Anthology", arXiv 2409.20325.
    """
    a, b, c = QUINTIC
    wide = x.shape[-2] < x.shape[-1]
    y: Tensor = x.mT if wide else x
    y = (y / (torch.linalg.matrix_norm(y, keepdim=True) + TINY)).to(dtype)
    y = y.reshape(-1, *y.shape[-2:])
    for _ in range(iterations):
        square = y.mT @ y
        y = torch.baddbmm(y, y, torch.baddbmm(square, square, square, beta=b, alpha=c), beta=a)
    return (y.mT if wide else y).to(x.dtype).reshape(x.shape)
