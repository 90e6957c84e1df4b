"""Lengths of updates: Adam's on a sample of the entries, and the norm of an update with a sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import address, dot, halves, narrow, number
from ._host import addresses, aligned, corrections, over, precision, roomy, tables, tl_type
from .lift import places_of, tile_of
from .moments import adam

GOLDEN = (math.sqrt(5) - 1) / 2
REACH = tl.constexpr(torch.finfo(torch.float32).max / 1024)
"""What entries are cut off at, as in the reference; one that is no number stays."""
BLOCK = 512
"""Entries of a sample that a program does."""


@cache
def stride_of(cols: int) -> int:
    """Return the columns between one entry and the next: see `functional.length.stride_of`."""
    stride = max(1, round(cols * GOLDEN))
    while math.gcd(stride, cols) != 1:
        stride += 1
    return stride


@triton.jit(do_not_specialize=["stride", "width", "count", "blocks", "each"])
def _sample(
    grads, m_table, v_table, starts, out, cols, stride, width, count, blocks, each, g_row, g_col,
    beta1, beta2, eps, correction1, correction2,
    G_TYPE: tl.constexpr, COUNTED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do some entries of the sample of one matrix; its places come from their numbers alone."""
    k = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,), as all that follows
    inside = entry < count
    col = (tl.load(starts + k) + entry * stride) % cols
    at = (entry // width) * g_row + col * g_col
    g = tl.load(address(grads, k, G_TYPE, False) + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(g > REACH, REACH, tl.where(g < -REACH, -REACH, g))
    m_at = address(m_table, k, tl.float32, ALIGNED) + entry
    v_at = address(v_table, k, tl.float32, ALIGNED) + entry
    m = tl.load(m_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    m, v, direction = adam(
        g, m, v, beta1, beta2, eps,
        number(correction1, k // each, COUNTED), number(correction2, k // each, COUNTED),
    )  # fmt: skip
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    finite = inside & (tl.abs(direction) < float("inf"))
    square = tl.where(finite, direction * direction, 0.0)
    tl.store(out + tl.program_id(0), tl.sum(square, axis=0))


def sample_moments(
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Move Adam's moments of a sample, return sums of squares: see `functional.sample_moments`.

    One launch for all matrices, which reads the entries of the sample and nothing else of the
    gradients. These have one shape and any strides, which are alike; moments are float32 and
    contiguous; counts are alike, or all on the device. Sums are made in a fixed order.
    """
    grad, moment = grads[0], exp_avg[0]
    *batch, rows, cols = grad.shape
    each, width = math.prod(batch), moment.shape[-1]
    count = rows * width
    blocks = over(count, BLOCK)
    out = torch.empty((len(grads), *batch, blocks), dtype=torch.float32, device=grad.device)
    if out.numel():
        places = [[at for x in xs for at in starts_of(x)] for xs in (grads, exp_avg, exp_avg_sq)]
        stride = stride_of(cols)
        starts = [first % cols * stride for first in firsts for _ in range(each)]
        correction1, correction2, counted = corrections(counts, beta1, beta2)
        _sample[(out.numel(),)](
            *tables(grad.device, *places, starts), out,
            cols, stride, width, count, blocks, each, *grad.stride()[-2:],
            float(beta1), float(beta2), float(eps), correction1, correction2,
            tl_type(grad), counted, aligned(*places[1:]), BLOCK, num_warps=4,
        )  # fmt: skip
    return out.sum(-1)


def starts_of(stack: Tensor) -> list[int]:
    """Return where the matrices of a stack `(..., rows, cols)` of any strides begin."""
    begin, size = stack.data_ptr(), stack.element_size()
    steps = stack.stride()[:-2]
    return [
        begin + size * sum(map(int.__mul__, place, steps))
        for place in product(*map(range, stack.shape[:-2]))
    ]


@triton.jit
def _squares(
    lifted, kept, first, grads, places, direction_in, k, row, rows, cols, rank, g_row, g_col, a, c,
    G_TYPE: tl.constexpr, INDEXED: tl.constexpr, DIRECTION: tl.constexpr, ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Return the squares of a tile, summed by row, piece by piece; beyond the matrix all is 0."""
    if lifted.shape[1] > PIECE:  # lifted and kept are (ROWS, width)
        left, right = halves(lifted)  # (ROWS, width / 2) each
        kept_left, kept_right = halves(kept)
        squares_left = _squares(
            left, kept_left, first, grads, places, direction_in, k, row, rows, cols, rank,
            g_row, g_col, a, c, G_TYPE, INDEXED, DIRECTION, ALIGNED, PIECE,
        )  # fmt: skip
        squares_right = _squares(
            right, kept_right, first + left.shape[1], grads, places, direction_in, k, row, rows,
            cols, rank, g_row, g_col, a, c, G_TYPE, INDEXED, DIRECTION, ALIGNED, PIECE,
        )  # fmt: skip
        return squares_left + squares_right
    else:
        col = (first + tl.arange(0, lifted.shape[1])).to(tl.int64)
        inside = (row[:, None] < rows) & (col[None, :] < cols)  # (ROWS, PIECE), as lifted
        g_at = address(grads, k, G_TYPE, ALIGNED) + row[:, None] * g_row + col[None, :] * g_col
        g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)  # (ROWS, PIECE)
        if INDEXED:
            # (PIECE,): which column of N lifts to this one, -1 for none
            place = tl.load(places + k.to(tl.int64) * cols + col, mask=col < cols, other=-1)
            chosen = inside & (place[None, :] >= 0)
            if DIRECTION:
                at = (k.to(tl.int64) * rows + row[:, None]) * rank + place[None, :]
                n = tl.load(direction_in + at, mask=chosen, other=0.0)
                lifted += a * n.to(tl.float32)
            dropped = tl.where(chosen, 0.0, g)
        else:
            dropped = g - kept
        x = lifted + c * ((dropped > 0).to(tl.float32) - (dropped < 0).to(tl.float32))
        return tl.sum(x * x, axis=1)  # (ROWS,)


@triton.jit(do_not_specialize=["row_tiles", "col_tiles"])
def _signs(
    grads, factors, places, low_in, direction_in, out,
    rows, cols, rank, row_tiles, col_tiles, g_row, g_col, f_col, f_rank, a, c,
    G_TYPE: tl.constexpr, F_TYPE: tl.constexpr, INDEXED: tl.constexpr, DIRECTION: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Do one tile (rows x cols) of one matrix; tiles that share rows of N run side by side."""
    col_tile = tl.program_id(0) % col_tiles
    rest = tl.program_id(0) // col_tiles
    k = rest // row_tiles
    row = (rest % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = col_tile * COLS
    col = (first + tl.arange(0, COLS)).to(tl.int64)
    in_rows, in_cols = row[:, None] < rows, col[None, :] < cols  # (ROWS, 1), (1, COLS)
    base = k.to(tl.int64) * rows * rank + row[:, None] * rank  # (ROWS, 1)
    lifted = tl.zeros((ROWS, COLS), dtype=tl.float32)
    kept = tl.zeros((ROWS, COLS), dtype=tl.float32)
    if not INDEXED:
        f_at = address(factors, k, F_TYPE, ALIGNED) + col[None, :] * f_col
        for start in range(0, rank, RANK):
            lane = start + tl.arange(0, RANK)  # (RANK,); mask is (ROWS, RANK)
            mask = in_rows & (lane[None, :] < rank)
            p = tl.load(  # (RANK, COLS): a piece of P^T
                f_at + lane[:, None].to(tl.int64) * f_rank,
                mask=in_cols & (lane[:, None] < rank), other=0.0,
            )  # fmt: skip
            p = narrow(p.to(tl.float32), G_TYPE)
            low = tl.load(low_in + base + lane[None, :], mask=mask, other=0.0)  # (ROWS, RANK)
            if DIRECTION:
                n = tl.load(direction_in + base + lane[None, :], mask=mask, other=0.0)
                lifted = dot(narrow(n.to(tl.float32), G_TYPE), p, lifted, PRECISION)
            kept = dot(narrow(low.to(tl.float32), G_TYPE), p, kept, PRECISION)
        lifted *= a
    squares = _squares(
        lifted, kept, first, grads, places, direction_in, k, row, rows, cols, rank, g_row, g_col,
        a, c, G_TYPE, INDEXED, DIRECTION, ALIGNED, PIECE,
    )  # fmt: skip
    tl.store(out + tl.program_id(0), tl.sum(squares, axis=0))


def sign_squares(
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    low: Tensor,
    direction: Tensor | None,
    update: Any,
) -> Tensor:
    """Return squared norms of updates with a sign: see `functional.sign_squares`.

    One launch for all, with the tiles and the products of `lift_write`, so that the signs are the
    ones that it writes: it reads what that reads except W, and writes one number a tile. These are
    added in a fixed order. Tensors are as in `lift_write`.
    """
    grad, factor = grads[0], factors[0]
    (rows, cols), device = grad.shape, grad.device
    indexed, half = factor.ndim == 1, grad.dtype != torch.float32
    tile = tile_of((rows, cols), factor.shape[-1], half, True, indexed, roomy(device))
    row_tiles, col_tiles = over(rows, tile.rows), over(cols, tile.cols)
    out = torch.empty((len(grads), row_tiles * col_tiles), dtype=torch.float32, device=device)
    places = addresses(grads), addresses(factors)
    _signs[(out.numel(),)](
        *tables(device, *places), places_of(factors, cols) if indexed else None,
        low, direction, out, rows, cols, factor.shape[-1], row_tiles, col_tiles, *grad.stride(),
        *((1, 1) if indexed else factor.stride()), float(update.direction), float(update.sign),
        tl_type(grad), tl_type(factor), indexed, direction is not None and update.direction != 0,
        aligned(*places), precision(),
        tile.rows, tile.cols, tile.rank, tile.piece, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.sum(-1)
