"""Moments as they lie in memory: a tensor, or a pair of 8-bit codes and their scales."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import blockwise
from .fourbit import dequantize_4bit, quantize_4bit
from .rounding import on_device, stochastic_round

Stored = Tensor | tuple[Tensor, Tensor]
Bits = Callable[[], Tensor]
"""Gives 16 random bits for each element of a moment, of its shape; drawn only if called."""


def load(stored: Stored, dtype: torch.dtype, square: bool, ops: ModuleType = blockwise) -> Tensor:
    """Return a moment in `dtype`; the stored tensor itself if it has that dtype.

    Args:
        stored: a tensor, or `(codes, scale)`; int8 codes are two values of four bits, and give an
            even number of columns.
        dtype: of the arithmetic.
        square: whether the moment is an average of squares, never negative.
        ops: has the functions of the 8-bit format; a module of kernels has them too.
    """
    if isinstance(stored, Tensor):
        return stored.to(dtype)
    codes, scale = by_rows(*stored)
    if codes.dtype == torch.int8:
        return dequantize_4bit(codes, scale, dtype)
    with on_device(codes.device):
        if square:
            value: Tensor = ops.dequantize_squares(codes, scale, dtype)
        else:
            value = ops.dequantize_blockwise(codes, scale, True, dtype)
    return value.view(stored[0].shape)


def store(
    stored: Stored, value: Tensor, square: bool, bits: Bits, ops: ModuleType = blockwise
) -> None:
    """Write a loaded and changed moment back, in place.

    bfloat16, four bits, and squares in 8 bits, are rounded stochastically: an average with a decay
    of 0.999 changes by less than half a step between neighbouring values, and would never fall. A
    signed 8-bit moment is rounded to nearest, to the bytes of bitsandbytes. What float64 has beyond
    the range of float32 is cut off, except of squares: their infinity makes a step of 0.

    Args:
        stored: what `load` was given.
        value: the moment, of its shape.
        square, ops: as in `load`.
        bits: random bits for the rounding.
    """
    narrow = stored if isinstance(stored, Tensor) else stored[1]
    if value.dtype == torch.float64 != narrow.dtype and not square:
        most = torch.finfo(narrow.dtype).max
        value = value.clamp(-most, most)
    if isinstance(stored, Tensor):
        if stored is not value:
            rounds = stored.dtype == torch.bfloat16
            stored.copy_(stochastic_round(value, bits()) if rounds else value)
        return
    codes, scale = by_rows(*stored)
    if codes.dtype == torch.int8:
        for piece, new in zip(stored, quantize_4bit(value, bits()), strict=True):
            piece.copy_(new)
        return
    rows = value.reshape(codes.shape)
    with on_device(codes.device):
        if square:
            fresh = ops.quantize_squares(rows, bits().view(codes.shape))
        else:
            fresh = ops.quantize_blockwise(rows, True)
    codes.copy_(fresh[0])
    scale.copy_(fresh[1])


def by_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes with the axis that blocks run along last.

    Moments of a projected matrix have blocks along their last axis. Moments of a parameter that is
    not projected have blocks along all axes except the first, along which shards are cut.
    """
    return (codes, scale) if codes.ndim == scale.ndim else (codes.flatten(1), scale)
