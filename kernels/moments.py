"""Adam on stored moments, one pass: load, update, store, direction or weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import address, narrow, number, peaks, random_bits, stochastic_round
from ._host import (
    Stored,
    addresses,
    aligned,
    corrections,
    matrix_shape,
    numbers,
    over,
    places_of_moments,
    rates,
    tables,
    tl_type,
    types_of,
)
from .blockwise import (
    codes_of,
    codes_of_squares,
    dequantize_squares_tile,
    dequantize_tile,
    signed_tables,
    square_table,
)

EXP_AVG = tl.constexpr(1)
EXP_AVG_SQ = tl.constexpr(2)
WEIGHT = tl.constexpr(0)
WIDTH = 256
"""Columns of a tile: a block of 8-bit moments."""


@triton.jit
def adam(g, m, v, beta1, beta2, eps, correction1, correction2):
    """Return the new moments and the direction: see `functional.adam`."""
    # g, m, v and the results are tiles of one shape, the rest are numbers
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    denominator = (tl.sqrt(v) * (1 / correction2) + eps) * correction1
    return m, v, m / denominator


@triton.jit
def load_moments(
    m_table, v_table, m_scales, v_scales, signed_map, square_map,
    k, row, block, blocks, at, inside, rows,
    M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, EIGHT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return a tile of both moments in float32."""
    m_at = address(m_table, k, M_TYPE, ALIGNED) + at
    v_at = address(v_table, k, V_TYPE, ALIGNED) + at
    m = tl.load(m_at, mask=inside, other=0)  # (HEIGHT, TILE), as `at` and `inside`
    v = tl.load(v_at, mask=inside, other=0)
    if EIGHT:
        scale_at = row * blocks + block  # (HEIGHT,): one scale a row of the tile
        scale = tl.load(
            address(m_scales, k, tl.float32, False) + scale_at, mask=row < rows, other=0.0
        )
        m = dequantize_tile(m, scale[:, None], signed_map)
        scale = tl.load(
            address(v_scales, k, tl.float32, False) + scale_at, mask=row < rows, other=0.0
        )
        v = dequantize_squares_tile(v, scale[:, None], square_map)
    return m.to(tl.float32), v.to(tl.float32)


@triton.jit
def store_moments(
    m, v, m_scale, v_scale, m_table, v_table, signed_map, square_map,
    k, row, col, at, inside, seed, step, stream,
    M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, EIGHT: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store a tile of both moments, rounded as `functional.store` does, without the scales."""
    m_at = address(m_table, k, M_TYPE, ALIGNED) + at  # (HEIGHT, TILE), as m, v, at and inside
    v_at = address(v_table, k, V_TYPE, ALIGNED) + at
    if EIGHT:  # a tile is one block a row: m_scale and v_scale are (HEIGHT,)
        code = codes_of(tl.where(inside, m, 0.0), m_scale, signed_map)
        tl.store(m_at, code.to(tl.uint8), mask=inside)
        bits = random_bits(seed, step, stream, row, col, EXP_AVG_SQ, TILE)
        code = codes_of_squares(tl.where(inside, v, 0.0), v_scale, bits, square_map)
        tl.store(v_at, code.to(tl.uint8), mask=inside)
    else:
        if tl.bfloat16 == M_TYPE:
            m = stochastic_round(m, random_bits(seed, step, stream, row, col, EXP_AVG, TILE))
        tl.store(m_at, m, mask=inside)
        if tl.bfloat16 == V_TYPE:
            v = stochastic_round(v, random_bits(seed, step, stream, row, col, EXP_AVG_SQ, TILE))
        tl.store(v_at, v, mask=inside)


@triton.jit
def scales_of(m, v, inside):
    """Return the scales of the rows of a tile of both moments."""
    return (  # (HEIGHT,) each, of (HEIGHT, TILE)
        peaks(tl.where(inside, tl.abs(m), 0.0)),
        peaks(tl.where(inside, v, 0.0)),
    )


@triton.jit
def store_scales(m_scale, v_scale, m_scales, v_scales, k, row, block, blocks, rows):
    """Store the scales of one block a row of both moments."""
    at = row * blocks + block  # (HEIGHT,), as m_scale, v_scale and row, into (rows, blocks)
    tl.store(address(m_scales, k, tl.float32, False) + at, m_scale, mask=row < rows)
    tl.store(address(v_scales, k, tl.float32, False) + at, v_scale, mask=row < rows)


@triton.jit(do_not_specialize=["seed", "step", "row_tiles", "blocks"])
def _adam(
    weights, grads, m_table, v_table, m_scales, v_scales, streams, out, signed_map, square_map,
    rows, cols, blocks, row_tiles, seed, step,
    beta1, beta2, eps, correction1, correction2, step_size, decay,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    EIGHT: tl.constexpr, COUNTED: tl.constexpr, RATED: tl.constexpr, WRITES: tl.constexpr,
    ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Do one tile of one matrix; a program has the number (matrix, row tile, block of columns)."""
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    k = rest // row_tiles
    row = (rest % row_tiles).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    col = block * TILE
    cols_here = col + tl.arange(0, TILE)  # (TILE,); row is (HEIGHT,)
    at = row[:, None] * cols + cols_here[None, :]  # (HEIGHT, TILE)
    inside = (row[:, None] < rows) & (cols_here[None, :] < cols)
    g = tl.load(address(grads, k, G_TYPE, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32)
    m, v = load_moments(
        m_table, v_table, m_scales, v_scales, signed_map, square_map,
        k, row, block, blocks, at, inside, rows, M_TYPE, V_TYPE, EIGHT, ALIGNED,
    )  # fmt: skip
    m, v, direction = adam(  # (HEIGHT, TILE) each
        g, m, v, beta1, beta2, eps,
        number(correction1, k, COUNTED), number(correction2, k, COUNTED),
    )  # fmt: skip
    stream = tl.load(streams + k)
    count = number(step, k, COUNTED).to(tl.uint32)
    m_scale = None
    v_scale = None
    if EIGHT:
        m_scale, v_scale = scales_of(m, v, inside)
        store_scales(m_scale, v_scale, m_scales, v_scales, k, row, block, blocks, rows)
    store_moments(
        m, v, m_scale, v_scale, m_table, v_table, signed_map, square_map,
        k, row, col, at, inside, seed, count, stream, M_TYPE, V_TYPE, EIGHT, ALIGNED, TILE,
    )  # fmt: skip
    if WRITES:
        p_at = address(weights, k, P_TYPE, ALIGNED) + at
        w = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
        w = number(decay, 0, RATED) * w + number(step_size, 0, RATED) * direction
        if ROUNDS:
            bits = random_bits(seed, count, stream, row, col, WEIGHT, TILE)
            tl.store(p_at, stochastic_round(w, bits), mask=inside)
        else:
            tl.store(p_at, narrow(w, P_TYPE), mask=inside)
    else:
        tl.store(out + k.to(tl.int64) * rows * cols + at, direction, mask=inside)


def adam_moments(
    grads: Sequence[Tensor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    noises: Sequence[Any],
) -> Tensor:
    """Load, update and store Adam's moments; return directions: see `functional.adam_moments`.

    The tensors are contiguous; counts are alike, or all on the device.
    """
    out = torch.empty((len(grads), *grads[0].shape), dtype=torch.float32, device=grads[0].device)
    _launch(grads, grads, exp_avg, exp_avg_sq, counts, beta1, beta2, eps, 0.0, 1.0, noises, out)
    return out


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float | Tensor,
    decay: float | Tensor,
    noises: Sequence[Any],
    rounded: bool,
) -> None:
    """Do whole AdamW steps, in place: see `functional.adam_step`.

    The tensors are contiguous; counts are alike, or all on the device.
    """
    rounds = rounded and params[0].dtype == torch.bfloat16
    _launch(
        params, grads, exp_avg, exp_avg_sq, counts, beta1, beta2, eps, step_size, decay, noises,
        None, rounds,
    )  # fmt: skip


def _launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float | Tensor,
    decay: float | Tensor,
    noises: Sequence[Any],
    out: Tensor | None,
    rounds: bool = False,
) -> None:
    grad = grads[0]
    if not grad.numel():
        return
    rows, cols = matrix_shape(grad)
    places = addresses(params), addresses(grads), *places_of_moments(exp_avg, exp_avg_sq)
    moved = tables(grad.device, *places, [noise.stream for noise in noises])
    m_type, v_type, eight = types_of(exp_avg[0], exp_avg_sq[0])
    correction1, correction2, counted = corrections(counts, beta1, beta2)
    steps, _ = numbers([noise.step for noise in noises])
    step_size, decay, rated = rates(step_size, decay)
    device = grad.device
    height = 1 if rows == 1 else 4
    row_tiles, blocks = over(rows, height), over(cols, WIDTH)
    _adam[(len(grads) * row_tiles * blocks,)](
        *moved, out, signed_tables(device), square_table(device),
        rows, cols, blocks, row_tiles, noises[0].seed, steps,
        float(beta1), float(beta2), float(eps), correction1, correction2, step_size, decay,
        tl_type(params[0]), tl_type(grad), m_type, v_type,
        eight, counted, rated, out is None, rounds,
        aligned(*places), height, WIDTH, num_warps=4,
    )  # fmt: skip
