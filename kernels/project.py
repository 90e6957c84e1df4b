"""The projection product with Adam's moments as its epilogue, row norms on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import address, dot, narrow, number
from ._host import (
    TYPES,
    Stored,
    aligned,
    corrections,
    form_of,
    moment_tables,
    numbers,
    precision,
    streams,
    tl_type,
)
from .blockwise import signed_tables, square_table
from .moments import adam, load_moments, store_moments
from .tables import pointers


class Norms(NamedTuple):
    """Row norms `(K, rows, 1)`: see `functional.Norms`."""

    grad: Tensor
    low: Tensor
    direction: Tensor


class Projected(NamedTuple):
    """See `functional.Projected`."""

    low: Tensor | None
    direction: Tensor | None
    norms: Norms | None


class Tile(NamedTuple):
    """Rows, columns of rank, and columns of the gradient that a program works on at once."""

    rows: int
    rank: int
    cols: int
    warps: int


def tile_of(rank: int, half: bool, eight: bool) -> Tile:
    """Return the tile: the one place that decides it.

    A block of 8-bit moments lies in one program. Registers hold the sums, (rows x rank) float32:
    64 a thread. Products in float32 have no tensor cores, and smaller tiles.
    """
    wide = 256 if eight else 128
    width = min(wide, max(16, triton.next_power_of_2(rank)))
    if not half:
        return Tile(32, width, 32, 8 if width == 256 else 4)
    return Tile(64 if width == 256 else 128, width, 64, 8)


@triton.jit(do_not_specialize=["seed", "step"])
def _project(
    grads, factors, m_table, v_table, m_scales, v_scales, streams, signed_map, square_map,
    low_out, direction_out, norms_out,
    rows, cols, rank, row_tiles, rank_tiles, matrices, g_row, g_col, f_col, f_rank,
    seed, step, beta1, beta2, eps, correction1, correction2,
    G_TYPE: tl.constexpr, F_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr, INDEXED: tl.constexpr, EIGHT: tl.constexpr, COUNTED: tl.constexpr,
    LOW: tl.constexpr, DIRECTION: tl.constexpr, NORMS: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Do one tile (rows x rank) of one matrix; tiles that share rows of G run side by side."""
    block = tl.program_id(0) % rank_tiles
    rest = tl.program_id(0) // rank_tiles
    k = rest // row_tiles
    row = (rest % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = block * RANK
    lane = first + tl.arange(0, RANK)
    step_of_cols = tl.arange(0, COLS)
    g_at = address(grads, k, G_TYPE, ALIGNED) + row[:, None] * g_row
    in_rows = row[:, None] < rows
    in_rank = lane[None, :] < rank
    f_base = address(factors, k, F_TYPE, ALIGNED)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    if INDEXED:
        column = tl.load(f_base + lane, mask=lane < rank, other=0)
        low = tl.load(g_at + column[None, :] * g_col, mask=in_rows & in_rank, other=0.0)
        low = low.to(tl.float32)
        if NORMS:
            if block == 0:
                for start in range(0, cols, COLS):
                    col = (start + step_of_cols).to(tl.int64)
                    g = tl.load(
                        g_at + col[None, :] * g_col, mask=in_rows & (col[None, :] < cols), other=0.0
                    ).to(tl.float32)
                    total += tl.sum(g * g, axis=1)
    else:
        f_at = f_base + lane[None, :].to(tl.int64) * f_rank
        low = tl.zeros((ROWS, RANK), dtype=tl.float32)
        for start in range(0, cols, COLS):
            col = (start + step_of_cols).to(tl.int64)
            g = tl.load(
                g_at + col[None, :] * g_col, mask=in_rows & (col[None, :] < cols), other=0.0
            )
            p = tl.load(
                f_at + col[:, None] * f_col, mask=(col[:, None] < cols) & in_rank, other=0.0
            )
            low = dot(g, narrow(p.to(tl.float32), G_TYPE), low, PRECISION)
            if NORMS:
                wide = g.to(tl.float32)
                total += tl.sum(wide * wide, axis=1)
    inside = in_rows & in_rank
    at = row[:, None] * rank + lane[None, :]
    m, v = load_moments(
        m_table, v_table, m_scales, v_scales, signed_map, square_map,
        k, row, block, rank_tiles, at, inside, rows, M_TYPE, V_TYPE, EIGHT, ALIGNED,
    )  # fmt: skip
    m, v, direction = adam(
        low, m, v, beta1, beta2, eps,
        number(correction1, k, COUNTED), number(correction2, k, COUNTED),
    )  # fmt: skip
    store_moments(
        m, v, m_table, v_table, m_scales, v_scales, signed_map, square_map,
        k, row, first, block, rank_tiles, at, inside, rows,
        seed, number(step, k, COUNTED).to(tl.uint32), tl.load(streams + k),
        M_TYPE, V_TYPE, EIGHT, ALIGNED, RANK,
    )  # fmt: skip
    out = k.to(tl.int64) * rows * rank + at
    if LOW:
        tl.store(low_out + out, narrow(low, OUT_TYPE), mask=inside)
    if DIRECTION:
        tl.store(direction_out + out, narrow(direction, OUT_TYPE), mask=inside)
    if NORMS:
        part = matrices.to(tl.int64) * rows * rank_tiles
        spot = norms_out + (k.to(tl.int64) * rows + row) * rank_tiles + block
        if block == 0:
            tl.store(spot, total, mask=row < rows)
        else:
            tl.store(spot, tl.zeros((ROWS,), dtype=tl.float32), mask=row < rows)
        kept = tl.where(inside, low, 0.0)
        tl.store(spot + part, tl.sum(kept * kept, axis=1), mask=row < rows)
        kept = tl.where(inside, direction, 0.0)
        tl.store(spot + 2 * part, tl.sum(kept * kept, axis=1), mask=row < rows)


def project_moments(
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    noises: Sequence[Any],
    want: tuple[bool, bool, bool] = (True, True, True),
) -> Projected:
    """Project gradients and update their moments: see `functional.project_moments`.

    One launch for all. Gradients `(rows, cols)` of one shape and of any strides, which are alike;
    factors likewise; moments contiguous; counts alike, or all on the device. Sums are float32;
    results are bfloat16 where the gradients are, else float32. Norms are summed by tiles,
    in a fixed order.
    """
    grad, factor = grads[0], factors[0]
    (rows, cols), rank, device = grad.shape, factor.shape[-1], grad.device
    half = grad.dtype != torch.float32
    m_type, v_type, eight = form_of(exp_avg[0], exp_avg_sq[0])
    tile = tile_of(rank, half, eight)
    row_tiles, rank_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(rank, tile.rank)
    shape = (len(grads), rows, rank)
    out_dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    low, direction = (
        torch.empty(shape, dtype=out_dtype, device=device) if wanted else None
        for wanted in want[:2]
    )
    squares = None
    if want[2]:
        squares = torch.empty((3, len(grads), rows, rank_tiles), device=device)
    m_table, v_table, m_scales, v_scales = moment_tables(exp_avg, exp_avg_sq)
    correction1, correction2, counted = corrections(counts, beta1, beta2)
    steps, _ = numbers([noise.step for noise in noises])
    indexed = factor.ndim == 1
    _project[(len(grads) * row_tiles * rank_tiles,)](
        pointers(grads), pointers(factors), m_table, v_table, m_scales, v_scales,
        streams(noises, device), signed_tables(device), square_table(device),
        low, direction, squares,
        rows, cols, rank, row_tiles, rank_tiles, len(grads), *grad.stride(),
        *((1, 1) if indexed else factor.stride()),
        noises[0].seed, steps, beta1, beta2, eps, correction1, correction2,
        tl_type(grad), tl_type(factor), m_type, v_type,
        TYPES[out_dtype], indexed, eight, counted,
        *want, aligned(grads, factors, exp_avg, exp_avg_sq), precision(),
        tile.rows, tile.rank, tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    norms = None
    if squares is not None:
        norms = Norms(*squares.sum(-1, keepdim=True).sqrt_().unbind())
    return Projected(low, direction, norms)
