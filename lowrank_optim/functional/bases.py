"""Bases of subspaces."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
