"""Other columns for moments in 8 bits: read, moved and written in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._device import address, number, peaks, random_bits
from ._host import aligned, numbers, over, tables
from .blockwise import (
    BLOCK,
    codes_of,
    codes_of_squares,
    dequantize_squares_tile,
    dequantize_tile,
    signed_tables,
    square_table,
)

VALUES = 2048
"""Values that a program moves; a row is never cut, however long."""


@triton.jit(do_not_specialize=["seed", "step", "row_tiles"])
def _move(
    codes_table, scales_table, streams, places, table, rows, rank, blocks, row_tiles, seed, step,
    batch, SQUARES: tl.constexpr, KIND: tl.constexpr, COUNTED: tl.constexpr, ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do some whole rows of one matrix: all is read before anything is written."""
    k = (tl.program_id(0) // row_tiles).to(tl.int64)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    lane = tl.arange(0, WIDTH)
    place = tl.load(places + k * rank + lane, mask=lane < rank, other=-1)[None, :]  # (1, WIDTH)
    codes = address(codes_table, k, tl.uint8, ALIGNED)
    scales = address(scales_table, k, tl.float32, ALIGNED)
    found = (row[:, None] < rows) & (place >= 0)  # (HEIGHT, WIDTH)
    code = tl.load(codes + row[:, None] * rank + place, mask=found, other=0)  # (HEIGHT, WIDTH)
    scale = tl.load(scales + row[:, None] * blocks + place // BLOCK, mask=found, other=0.0)
    if SQUARES:
        value = dequantize_squares_tile(code, scale, table)
    else:
        value = dequantize_tile(code, scale, table)
    # A row a block of codes, (HEIGHT * WIDTH // BLOCK, BLOCK), each with a scale of its own.
    value = tl.where(found, value, 0.0).reshape(HEIGHT * WIDTH // BLOCK, BLOCK)
    if SQUARES:
        count, stream = number(step, k // batch, COUNTED).to(tl.uint32), tl.load(streams + k)
        bits = random_bits(seed, count, stream, row, 0, KIND, WIDTH)  # (HEIGHT, WIDTH)
        scale = peaks(value)
        code = codes_of_squares(value, scale, bits.reshape(value.shape), table)
    else:
        scale = peaks(tl.abs(value))
        code = codes_of(value, scale, table)
    tl.debug_barrier()
    piece = tl.arange(0, HEIGHT * WIDTH // BLOCK)  # number of a block; row and block likewise
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * HEIGHT + piece // (WIDTH // BLOCK)
    block = piece % (WIDTH // BLOCK)
    # (HEIGHT * WIDTH // BLOCK, BLOCK), as code
    col = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None] < rows) & (col < rank)
    tl.store(codes + row[:, None] * rank + col, code.to(tl.uint8), mask=inside)
    spot = scales + row * blocks + block
    tl.store(spot, scale, mask=(row < rows) & (block < blocks))


def move_columns(
    moments: Sequence[tuple[Tensor, Tensor]],
    places: Tensor,
    square: bool,
    noises: Sequence[Any],
    kind: int,
) -> None:
    """Give moments in 8 bits other columns, in place: see `functional.move_columns`.

    The tensors are contiguous; the steps of the noises are alike, or all on the device.
    """
    *batch, rows, rank = moments[0][0].shape
    if not moments[0][0].numel():
        return
    each = math.prod(batch)
    device, blocks = places.device, moments[0][1].shape[-1]
    codes, scales = ([at for moment in moments for at in _starts(moment[i], each)] for i in (0, 1))
    lengths = [rows if noise.height is None else noise.height for noise in noises]
    streams = [
        noise.stream + k * length
        for noise, length in zip(noises, lengths, strict=True)
        for k in range(each)
    ]
    between = [1] * (1 + len(batch) - (places.ndim - 1))
    places = places.view(len(moments), *between, *places.shape[1:])
    places = places.expand(len(moments), *batch, rank).contiguous()
    step, counted = numbers([noise.step for noise in noises])
    width = max(BLOCK, triton.next_power_of_2(rank))
    height = max(1, VALUES // width)
    row_tiles = over(rows, height)
    _move[(len(codes) * row_tiles,)](
        *tables(device, codes, scales, streams), places,
        square_table(device) if square else signed_tables(device),
        rows, rank, blocks, row_tiles, noises[0].seed, step, each,
        square, kind, counted, aligned(codes, scales), height, width, BLOCK,
        num_warps=4 if width * height <= VALUES else 8,
    )  # fmt: skip


def _starts(stack: Tensor, count: int) -> list[int]:
    """Return where the matrices of a contiguous stack begin."""
    size = stack.numel() // count * stack.element_size()
    return [stack.data_ptr() + k * size for k in range(count)]
