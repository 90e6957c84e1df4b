"""How a parameter is seen as a matrix: its shape, its side, and the view that steps work on."""

from __future__ import annotations

import torch

Shape = tuple[int, ...]


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
