"""How a row is factored for the cosine transform, and the matrices of its two products."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._host import upload

LARGEST = (128, 64)
"""The largest n1 and n2: beyond them a tile no longer fits the registers of a program."""


class Factoring(NamedTuple):
    """n = n1 n2 with n1 even; tiles: twice `(a, a) @ (a, b)`, then `(a, b) @ (b, b)`, a >= n1/2."""

    n1: int
    n2: int
    a: int
    b: int
    warps: int


def _tile(size: int) -> int:
    """Return the next power of two that a product on tensor cores takes."""
    return max(16, 1 << (size - 1).bit_length())


@lru_cache(maxsize=256)
def _factorings(n: int) -> tuple[Factoring, ...]:
    """Return the factorings of width n, the one of least work first."""
    found = []
    for n1 in range(2, LARGEST[0] + 1, 2):
        n2, left = divmod(n, n1)
        if left == 0 and 1 <= n2 <= LARGEST[1]:
            a, b = _tile(n1 // 2), _tile(n2)
            # A warp holds 16 rows of a tile, so that the first product feeds the second from
            # registers; more warps would do the same work twice.
            found.append(Factoring(n1, n2, a, b, a // 16))
    # Flops; of equal ones the one with more slots, which make taller tiles and a narrower sum.
    return tuple(sorted(found, key=lambda p: (p.a * p.b * (p.a + p.b), -p.n1)))


def supports(cols: int, dtype: torch.dtype = torch.float32) -> bool:
    """Say whether the kernel takes a width: n1 n2, n1 even and at most 128, n2 at most 64."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and len(_factorings(cols)) > 0


def factored(n: int) -> Factoring:
    """Return the factoring of least work for a width that `supports` accepts."""
    return _factorings(n)[0]


def _padded(*matrices: Tensor) -> Tensor:
    """Return matrices stacked, each with zeros up to a square or a strip of tiles."""
    height, width = (_tile(size) for size in matrices[0].shape)
    stack = torch.zeros(len(matrices), height, width, dtype=torch.float64, device="cpu")
    for room, matrix in zip(stack, matrices, strict=True):
        room[: matrix.shape[0], : matrix.shape[1]] = matrix
    return stack


def _turns(steps: Tensor, circle: int) -> tuple[Tensor, Tensor]:
    """Return the parts of exp(-2 pi i steps / circle) in float64."""
    phase = steps.remainder(circle).to(torch.float64) * (2 * math.pi / circle)
    return phase.cos(), phase.sin().neg()


def _rounded(matrices: Tensor, dtype: torch.dtype, split: bool, device: torch.device) -> Tensor:
    """Return matrices rounded to `dtype`, followed by what the rounding left if `split`.

    The interpreter cannot multiply bfloat16: there, the same numbers are held in float32.
    """
    high = matrices.to(dtype)
    both = torch.cat((high, (matrices - high).to(dtype))) if split else high
    return upload(both.float() if device.type == "cpu" else both, device)


@lru_cache(maxsize=64)
def cosines(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of both products and the twiddle between them, made in float64.

    W[k1, a] = exp(-2 pi i k1 a / n1), the imaginary part of slot 0 being (-1)^a, which is W[n1/2]
    T[k1, b] = sqrt(2/n) exp(-i pi k1 (4b+1) / (2n))
    M[b, k2] = exp(-i pi k2 (4b+1) / (2 n2))
    H[b, k2] = sqrt(2/n) cos(pi (2 k2 + 1) (4b+1) / (4 n2)), for the class k1 = n1/2

    Args:
        n: the width.
        dtype: of the gradient. For float32, W, M and H are bfloat16 numbers and what these leave.
        device: of the result.

    Returns:
        W `(4, a, a)`: real and imaginary parts for a < n1/2, then for the others; T `(2, a, b)`
        in float32; and Re M, Im M, H `(3, b, b)`. W and M have twice as many where they are split.
    """
    n1, n2, *_ = factored(n)
    half = n1 // 2
    k1 = torch.arange(half, device="cpu").unsqueeze(1)
    along_a = torch.arange(n1, device="cpu")
    along_b = torch.arange(n2, device="cpu")
    quarter = 4 * along_b + 1
    scale = math.sqrt(2 / n)
    w_re, w_im = _turns(k1 * along_a, n1)
    w_im[0] = 1 - 2 * (along_a % 2)
    w = _padded(w_re[:, :half], w_im[:, :half], w_re[:, half:], w_im[:, half:])
    t = _padded(*_turns(k1 * quarter, 4 * n)).mul_(scale)
    h = _turns(quarter.unsqueeze(1) * (2 * along_b + 1), 8 * n2)[0].mul_(scale)
    m = _padded(*_turns(quarter.unsqueeze(1) * along_b, 4 * n2), h)
    split = dtype == torch.float32
    first = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return (
        _rounded(w, first, split, device),
        upload(t.float(), device),
        _rounded(m, torch.bfloat16, split, device),
    )
