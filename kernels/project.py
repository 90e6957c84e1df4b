"""The projection product with Adam's moments as its epilogue, row norms on the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import address, dot, halves, narrow, number
from ._host import (
    TYPES,
    Stored,
    addresses,
    aligned,
    corrections,
    numbers,
    over,
    places_of_moments,
    precision,
    roomy,
    tables,
    tl_type,
    types_of,
)
from .blockwise import signed_tables, square_table
from .moments import adam, load_moments, scales_of, store_moments, store_scales
from .norms import row_norms

HEIGHT = 1
"""Rows of a tile of 8-bit moments: of one, a warp finds the scale without the others."""


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
    """What a program works on at once.

    Attributes:
        rows: of the gradient.
        rank: columns of rank.
        cols: columns of the gradient that one product takes.
        piece: columns of rank that are finished at once.
        warps: of a program.
        stages: of loads on their way.
    """

    rows: int
    rank: int
    cols: int
    piece: int
    warps: int
    stages: int


@lru_cache(maxsize=256)
def tile_of(rows: int, rank: int, half: bool, eight: bool, indexed: bool, room: bool) -> Tile:
    """Return the tile: the one place that decides it.

    Of G with n columns, per parameter, a program of (rows x width) reads from the second-level
    cache 2 r / width bytes of G and 2 r / rows of P; from memory G once, 2 bytes, and 18 r / n for
    moments in float32 and N (14 r / n in 8 bits, the sums between two launches included). Products
    are 2 r flops. On an H200 (790 TFLOP/s, 4.3 TB/s, about 6 TB/s from the second level), in ps for
    n = 4096, r = 256, 512, 1024:

        products              0.65  1.30  2.59
        memory                0.73  0.99  1.51
        second level, 128^2   1.33  2.67  5.33
        second level, 128x256 1.00  2.00  4.00

    so the tile is as wide as the sums leave registers for, 128 of 255 a thread; what follows the
    product is done in pieces of 16 columns, or it would not fit beside them. Four stages of 24 KiB
    stay below the 99 KiB of the smallest devices; three on their way at 1 us are 72 KiB a
    multiprocessor and us, 9.5 TB/s. Where there is room, three of 48 KiB are faster: 23 ms for all
    matrices of LLaMA-7B instead of 28 at r = 1024, 6.3 instead of 7.4 at 256. Products in float32
    have no tensor cores, and small tiles; chosen columns have no product. A block of 8-bit moments
    is the width of a tile. No tile is much larger than the matrix.
    """
    height = max(16, triton.next_power_of_2(rows))
    width = min(256, max(16, triton.next_power_of_2(rank)))
    if indexed:
        return Tile(16, width, 128, width, 8, 2)
    if not half:
        width = width if eight else min(128, width)
        return Tile(min(32, height), width, 32, min(64, width), 8 if width == 256 else 4, 2)
    cols, stages = (64, 3) if room else (32, 4)
    return Tile(min(128, height), width, cols, 16, 8 if height > 32 else 4, stages)


@triton.jit
def _moved(
    low, first, m_table, v_table, m_scales, v_scales, signed_map, square_map,
    k, row, block, blocks, rows, rank, beta1, beta2, eps, correction1, correction2,
    M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, EIGHT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the new moments of a piece, its direction, where it lies and what of it exists."""
    lane = first + tl.arange(0, low.shape[1])
    inside = (row[:, None] < rows) & (lane[None, :] < rank)
    at = row[:, None] * rank + lane[None, :]  # (ROWS, PIECE)
    m, v = load_moments(
        m_table, v_table, m_scales, v_scales, signed_map, square_map,
        k, row, block, blocks, at, inside, rows, M_TYPE, V_TYPE, EIGHT, ALIGNED,
    )  # fmt: skip
    m, v, direction = adam(low, m, v, beta1, beta2, eps, correction1, correction2)
    return m, v, direction, at, inside


@triton.jit
def _finish(
    low, first, m_table, v_table, m_scales, v_scales, signed_map, square_map,
    low_out, direction_out, k, row, block, blocks, rows, rank, seed, step, stream,
    beta1, beta2, eps, correction1, correction2,
    M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, EIGHT: tl.constexpr,
    LOW: tl.constexpr, DIRECTION: tl.constexpr, NORMS: tl.constexpr, ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Do all that follows the product, piece by piece; return squares of R and N, summed by row.

    A barrier keeps the loads of the next piece, and their registers, behind this one's stores.
    """
    if low.shape[1] > PIECE:  # low is (ROWS, width)
        left, right = halves(low)  # (ROWS, width / 2) each
        low_left, direction_left = _finish(
            left, first, m_table, v_table, m_scales, v_scales, signed_map, square_map,
            low_out, direction_out, k, row, block, blocks, rows, rank, seed, step, stream,
            beta1, beta2, eps, correction1, correction2,
            M_TYPE, V_TYPE, OUT_TYPE, EIGHT, LOW, DIRECTION, NORMS, ALIGNED, PIECE,
        )  # fmt: skip
        tl.debug_barrier()
        low_right, direction_right = _finish(
            right, first + left.shape[1], m_table, v_table, m_scales, v_scales, signed_map,
            square_map, low_out, direction_out, k, row, block, blocks, rows, rank, seed, step,
            stream, beta1, beta2, eps, correction1, correction2,
            M_TYPE, V_TYPE, OUT_TYPE, EIGHT, LOW, DIRECTION, NORMS, ALIGNED, PIECE,
        )  # fmt: skip
        return low_left + low_right, direction_left + direction_right
    else:
        m, v, direction, at, inside = _moved(
            low, first, m_table, v_table, m_scales, v_scales, signed_map, square_map,
            k, row, block, blocks, rows, rank, beta1, beta2, eps, correction1, correction2,
            M_TYPE, V_TYPE, EIGHT, ALIGNED,
        )  # fmt: skip
        m_scale = None
        v_scale = None
        if EIGHT:
            m_scale, v_scale = scales_of(m, v, inside)
            store_scales(m_scale, v_scale, m_scales, v_scales, k, row, block, blocks, rows)
        store_moments(
            m, v, m_scale, v_scale, m_table, v_table, signed_map, square_map,
            k, row, first, at, inside, seed, step, stream,
            M_TYPE, V_TYPE, EIGHT, ALIGNED, low.shape[1],
        )  # fmt: skip
        out = k.to(tl.int64) * rows * rank + at  # (ROWS, PIECE), into (K, rows, rank)
        if LOW:
            tl.store(low_out + out, narrow(low, OUT_TYPE), mask=inside)
        if DIRECTION:
            tl.store(direction_out + out, narrow(direction, OUT_TYPE), mask=inside)
        if NORMS:
            low = tl.where(inside, low, 0.0)
            direction = tl.where(inside, direction, 0.0)
            return tl.sum(low * low, axis=1), tl.sum(direction * direction, axis=1)  # (ROWS,) each
        else:
            return 0.0, 0.0


@triton.jit(do_not_specialize=["seed", "step", "row_tiles", "rank_tiles", "matrices"])
def _project(
    grads, factors, m_table, v_table, m_scales, v_scales, streams, signed_map, square_map,
    low_out, direction_out, norms_out,
    rows, cols, rank, row_tiles, rank_tiles, matrices, g_row, g_col, f_col, f_rank,
    seed, step, beta1, beta2, eps, correction1, correction2,
    G_TYPE: tl.constexpr, F_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr, INDEXED: tl.constexpr, EIGHT: tl.constexpr, COUNTED: tl.constexpr,
    LOW: tl.constexpr, DIRECTION: tl.constexpr, NORMS: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Do one tile (rows x rank) of one matrix; tiles that share rows of G run side by side."""
    block = tl.program_id(0) % rank_tiles
    rest = tl.program_id(0) // rank_tiles
    k = rest // row_tiles
    row = (rest % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = block * RANK
    lane = first + tl.arange(0, RANK)  # (RANK,); row is (ROWS,)
    step_of_cols = tl.arange(0, COLS)
    g_at = address(grads, k, G_TYPE, ALIGNED) + row[:, None] * g_row  # (ROWS, 1)
    in_rows = row[:, None] < rows
    in_rank = lane[None, :] < rank
    f_base = address(factors, k, F_TYPE, ALIGNED)
    if INDEXED:
        column = tl.load(f_base + lane, mask=lane < rank, other=0)  # (RANK,)
        low = tl.load(g_at + column[None, :] * g_col, mask=in_rows & in_rank, other=0.0)
        low = low.to(tl.float32)  # (ROWS, RANK)
    else:
        f_at = f_base + lane[None, :].to(tl.int64) * f_rank  # (1, RANK)
        low = tl.zeros((ROWS, RANK), dtype=tl.float32)
        for start in range(0, cols, COLS):
            col = (start + step_of_cols).to(tl.int64)
            g = tl.load(  # (ROWS, COLS)
                g_at + col[None, :] * g_col, mask=in_rows & (col[None, :] < cols), other=0.0
            )
            p = tl.load(  # (COLS, RANK)
                f_at + col[:, None] * f_col, mask=(col[:, None] < cols) & in_rank, other=0.0
            )
            low = dot(g, narrow(p.to(tl.float32), G_TYPE), low, PRECISION)
    stream, count = tl.load(streams + k), number(step, k, COUNTED).to(tl.uint32)
    correct1, correct2 = number(correction1, k, COUNTED), number(correction2, k, COUNTED)
    if EIGHT:
        _keep(low, first, k, row, rows, rank, low_out, PIECE)
    else:
        low_squares, direction_squares = _finish(
            low, first, m_table, v_table, m_scales, v_scales, signed_map, square_map,
            low_out, direction_out, k, row, block, rank_tiles, rows, rank, seed, count, stream,
            beta1, beta2, eps, correct1, correct2,
            M_TYPE, V_TYPE, OUT_TYPE, False, LOW, DIRECTION, NORMS, ALIGNED, PIECE,
        )  # fmt: skip
        if NORMS:
            part = matrices.to(tl.int64) * rows * rank_tiles
            spot = norms_out + (k.to(tl.int64) * rows + row) * rank_tiles + block  # (ROWS,)
            tl.store(spot, low_squares, mask=row < rows)
            tl.store(spot + part, direction_squares, mask=row < rows)


@triton.jit
def _keep(low, first, k, row, rows, rank, low_out, PIECE: tl.constexpr):
    """Store sums as they are."""
    if low.shape[1] > PIECE:  # low is (ROWS, width)
        left, right = halves(low)  # (ROWS, width / 2) each
        _keep(left, first, k, row, rows, rank, low_out, PIECE)
        _keep(right, first + left.shape[1], k, row, rows, rank, low_out, PIECE)
    else:
        lane = first + tl.arange(0, low.shape[1])  # (PIECE,); row is (ROWS,), low (ROWS, PIECE)
        at = (k.to(tl.int64) * rows + row[:, None]) * rank + lane[None, :]
        tl.store(low_out + at, low, mask=(row[:, None] < rows) & (lane[None, :] < rank))


@triton.jit(do_not_specialize=["seed", "step", "row_tiles", "blocks", "matrices"])
def _project_eight(
    low_in, m_table, v_table, m_scales, v_scales, streams, signed_map, square_map,
    low_out, direction_out, norms_out,
    rows, rank, row_tiles, blocks, matrices,
    seed, step, beta1, beta2, eps, correction1, correction2,
    OUT_TYPE: tl.constexpr, COUNTED: tl.constexpr, LOW: tl.constexpr, DIRECTION: tl.constexpr,
    NORMS: tl.constexpr, ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Do what follows the product where moments have 8 bits: some rows of one block."""
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    k = rest // row_tiles
    row = (rest % row_tiles).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    lane = block * WIDTH + tl.arange(0, WIDTH)  # (WIDTH,); row is (HEIGHT,), low (HEIGHT, WIDTH)
    at = (k.to(tl.int64) * rows + row[:, None]) * rank + lane[None, :]
    low = tl.load(low_in + at, mask=(row[:, None] < rows) & (lane[None, :] < rank), other=0.0)
    low_squares, direction_squares = _finish(
        low, block * WIDTH, m_table, v_table, m_scales, v_scales, signed_map, square_map,
        low_out, direction_out, k, row, block, blocks, rows, rank,
        seed, number(step, k, COUNTED).to(tl.uint32), tl.load(streams + k),
        beta1, beta2, eps, number(correction1, k, COUNTED), number(correction2, k, COUNTED),
        tl.uint8, tl.uint8, OUT_TYPE, True, LOW, DIRECTION, NORMS, ALIGNED, WIDTH,
    )  # fmt: skip
    if NORMS:
        part = matrices.to(tl.int64) * rows * blocks
        spot = norms_out + (k.to(tl.int64) * rows + row) * blocks + block  # (HEIGHT,)
        tl.store(spot, low_squares, mask=row < rows)
        tl.store(spot + part, direction_squares, mask=row < rows)


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

    One launch for all, two for 8-bit moments, with the sums in memory between them. Gradients
    `(rows, cols)` of one shape and of any strides, which are alike; factors likewise; moments
    contiguous; counts alike, or all on the device. Sums are float32; results are bfloat16 where the
    gradients are, else float32. Norms are summed by tiles, in a fixed order. Norms of the gradients
    take a pass of their own, because the product takes gradients from shared memory, not from
    registers: with the sums in its loop it took 38 ms a step of LLaMA-7B at rank 1024 on an H200,
    without 25, and reading the gradients takes 3.
    """
    grad, factor = grads[0], factors[0]
    (rows, cols), rank, device = grad.shape, factor.shape[-1], grad.device
    half = grad.dtype != torch.float32
    m_type, v_type, eight = types_of(exp_avg[0], exp_avg_sq[0])
    indexed = factor.ndim == 1
    tile = tile_of(rows, rank, half, eight, indexed, roomy(device))
    row_tiles, rank_tiles = over(rows, tile.rows), over(rank, tile.rank)
    shape = (len(grads), rows, rank)
    out_dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    low, direction = (
        torch.empty(shape, dtype=out_dtype, device=device) if wanted else None
        for wanted in want[:2]
    )
    squares = None
    if want[2]:
        squares = torch.empty((2, len(grads), rows, rank_tiles), dtype=torch.float32, device=device)
    places = addresses(grads), addresses(factors), *places_of_moments(exp_avg, exp_avg_sq)
    *moved, streams = tables(device, *places, [noise.stream for noise in noises])
    correction1, correction2, counted = corrections(counts, beta1, beta2)
    steps, _ = numbers([noise.step for noise in noises])
    maps = signed_tables(device), square_table(device)
    adams = noises[0].seed, steps, float(beta1), float(beta2), float(eps), correction1, correction2
    sums = torch.empty(shape, dtype=torch.float32, device=device) if eight else low
    known = aligned(*places)
    _project[(len(grads) * row_tiles * rank_tiles,)](
        *moved, streams, *maps, sums, direction, squares,
        rows, cols, rank, row_tiles, rank_tiles, len(grads), *grad.stride(),
        *((1, 1) if indexed else factor.stride()), *adams,
        tl_type(grad), tl_type(factor), m_type, v_type, TYPES[out_dtype], indexed, eight, counted,
        *want, known, precision(), tile.rows, tile.rank, tile.cols, tile.piece,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if eight:
        row_tiles = over(rows, HEIGHT)
        _project_eight[(len(grads) * row_tiles * rank_tiles,)](
            sums, *moved[2:], streams, *maps, low, direction, squares,
            rows, rank, row_tiles, rank_tiles, len(grads), *adams,
            TYPES[out_dtype], counted, *want, known, HEIGHT, tile.rank, num_warps=1,
        )  # fmt: skip
    norms = None
    if squares is not None:
        norms = Norms(row_norms(grads, moved[0], known), *squares.sum(-1, keepdim=True).sqrt_())
    return Projected(low, direction, norms)
