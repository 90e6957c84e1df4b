"""How a parameter is seen as a matrix: its shape, its side, and the view that steps work on."""

from __future__ import annotations

import torch
from torch import Tensor

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


def oriented(tensor: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Return the tensor as a matrix or stack, and its view with the projected axis last.

    `wide` says that the view is the transposed one, see `is_wide`.

    The first is a view of the tensor too, unless it is a convolution's weight whose strides do not
    allow that (channels last): then it is a copy.
    """
    matrix = tensor if tensor.ndim <= 3 else tensor.flatten(1)
    return matrix, matrix.mT if wide else matrix
