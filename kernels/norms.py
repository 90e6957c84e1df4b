"""Norms of the rows of matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import address
from ._host import over, tl_type


@triton.jit(do_not_specialize=["row_tiles"])
def _row_norms(
    grads, out, rows, cols, row_tiles, g_row, g_col,
    G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Do some rows of one matrix."""
    k = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = address(grads, k, G_TYPE, ALIGNED) + row[:, None] * g_row  # (ROWS, 1)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, cols, COLS):
        col = (start + tl.arange(0, COLS)).to(tl.int64)
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        g = tl.load(at + col[None, :] * g_col, mask=inside, other=0.0).to(tl.float32)
        total += g * g  # (ROWS, COLS)
    norm = tl.sqrt_rn(tl.sum(total, axis=1))  # (ROWS,)
    tl.store(out + k.to(tl.int64) * rows + row, norm, mask=row < rows)


def row_norms(grads: Sequence[Tensor], table: Tensor, aligned: bool) -> Tensor:
    """Return the norm of each row, `(K, rows, 1)` in float32, summed in a fixed order.

    Args:
        grads: K matrices `(rows, cols)` of one dtype and of any strides, which are alike.
        table: where they begin, on their device.
        aligned: whether all begin at multiples of 16 bytes.
    """
    grad = grads[0]
    rows, cols = grad.shape
    out = torch.empty((len(grads), rows, 1), dtype=torch.float32, device=grad.device)
    height, width = (64, 32) if grad.stride(0) == 1 else (8, 512)
    row_tiles = over(rows, height)
    _row_norms[(len(grads) * row_tiles,)](
        table, out, rows, cols, row_tiles, *grad.stride(),
        tl_type(grad), aligned, height, width, num_warps=4,
    )  # fmt: skip
    return out
