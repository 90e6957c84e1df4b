"""How a parameter is seen as a matrix, and which of its axes is projected to what length."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .auto_rank import AutoRank

Shape = tuple[int, ...]

MIN_DIM = 128
"""Default of `min_dim`, as of optax's Adafactor (`min_dim_size_to_factor`): on shorter matrices a
share of the axis saves little of a model's state, see `docs/choosing.md`."""


def matrix_shape(shape: Shape) -> Shape | None:
    """Return the shape as a matrix `(m, n)` or a stack `(E, m, n)`; None if it is neither.

    A convolution's weight `(out, in, k, k)`, or one of more dimensions, is `(out, in*k*k)`. Three
    dimensions are always a stack.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    if len(shape) <= 3:
        return tuple(shape)
    return (shape[0], torch.Size(shape[1:]).numel())


def is_wide(shape: Shape, side: str) -> bool:
    """Return whether the matrix is seen transposed, so that the projected axis comes last."""
    rows, cols = shape[-2:]
    if side == "auto":
        return rows < cols
    if side == "reverse":
        return rows >= cols
    return side == "left"


def oriented(tensor: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Return the tensor as a matrix or stack, and its view with the projected axis last.

    `wide` says that the view is the transposed one, see `is_wide`.

    The first is a view of the tensor too, unless it is a convolution's weight whose strides do not
    allow that (channels last): then it is a copy.
    """
    matrix = tensor if tensor.ndim <= 3 else tensor.flatten(1)
    return matrix, matrix.mT if wide else matrix


@lru_cache(maxsize=4096, typed=True)
def subspace_of(
    shape: Shape,
    rank: int | float | AutoRank | None,
    side: str,
    whole: bool = False,
    full: bool = False,
    min_dim: int = 1,
) -> tuple[int, int] | None:
    """Return the length of the projected axis and the rank in columns; None if not projected.

    Not projected are: a group without rank, fewer than two dimensions, no elements, a projected
    axis that is no longer than the rank, and, where the rank is a share below 1, a matrix with an
    axis shorter than `min_dim`. Where matrices are taken `whole` (`Blocks`), the rank is their
    share, which leaves none out but at 1. With `full`, nothing is left out for a rank that drops
    nothing.
    """
    matrix = matrix_shape(shape)
    if matrix is None or rank is None:
        return None
    cols = matrix[-2] if is_wide(matrix, side) else matrix[-1]
    auto = isinstance(rank, AutoRank)
    if whole and not full and (isinstance(rank, AutoRank) or rank >= 1):
        return None
    least = rank.least if isinstance(rank, AutoRank) else rank
    share = isinstance(least, float) and least < 1
    if share and not whole and min(matrix[-2:]) < min_dim:
        return None
    width = min(width_of(rank, cols, whole), cols)
    return (cols, width) if whole or full or auto or width < cols else None


def width_of(rank: int | float | AutoRank, cols: int, whole: bool) -> int:
    """Return the rank in columns: all where matrices are taken `whole`, the largest of several."""
    if whole:
        return cols
    if isinstance(rank, AutoRank):
        return rank.bounds(cols)[1]
    return max(1, round(rank * cols)) if isinstance(rank, float) else rank
