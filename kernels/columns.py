"""Other columns for moments in 8 bits: read, moved and written in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import number, peaks, random_bits
from ._host import over
from .blockwise import (
    BLOCK,
    codes_of,
    codes_of_squares,
    dequantize_squares_tile,
    dequantize_tile,
    signed_tables,
    square_table,
)
from .tables import tables

VALUES = 2048
"""Values that a program moves; a row is never cut, however long."""


@triton.jit(do_not_specialize=["seed", "step", "row_tiles"])
def _move(
    codes, scales, places, streams, table, rows, rank, blocks, row_tiles, seed, step,
    SQUARES: tl.constexpr, KIND: tl.constexpr, COUNTED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do some whole rows of one matrix: all is read before anything is written."""
    k = (tl.program_id(0) // row_tiles).to(tl.int64)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    lane = tl.arange(0, WIDTH)
    place = tl.load(places + k * rank + lane, mask=lane < rank, other=-1)[None, :]
    line = k * rows + row[:, None]
    found = (row[:, None] < rows) & (place >= 0)
    code = tl.load(codes + line * rank + place, mask=found, other=0)
    scale = tl.load(scales + line * blocks + place // BLOCK, mask=found, other=0.0)
    if SQUARES:
        value = dequantize_squares_tile(code, scale, table)
    else:
        value = dequantize_tile(code, scale, table)
    value = tl.where(found, value, 0.0).reshape(HEIGHT * WIDTH // BLOCK, BLOCK)
    if SQUARES:
        count, stream = number(step, 0, COUNTED).to(tl.uint32), tl.load(streams + k)
        bits = random_bits(seed, count, stream, row, 0, KIND, WIDTH)
        scale = peaks(value)
        code = codes_of_squares(value, scale, bits.reshape(value.shape), table)
    else:
        scale = peaks(tl.abs(value))
        code = codes_of(value, scale, table)
    tl.debug_barrier()
    piece = tl.arange(0, HEIGHT * WIDTH // BLOCK)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * HEIGHT + piece // (WIDTH // BLOCK)
    block = piece % (WIDTH // BLOCK)
    col = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None] < rows) & (col < rank)
    tl.store(codes + (k * rows + row[:, None]) * rank + col, code.to(tl.uint8), mask=inside)
    spot = scales + (k * rows + row) * blocks + block
    tl.store(spot, scale, mask=(row < rows) & (block < blocks))


def move_columns(
    stored: tuple[Tensor, Tensor], places: Tensor, square: bool, noise: Any, kind: int
) -> None:
    """Give a moment in 8 bits other columns, in place: see `functional.move_columns`."""
    codes, scale = stored
    *batch, rows, rank = codes.shape
    if not codes.numel():
        return
    device, count = codes.device, codes.numel() // (rows * rank)
    places = places.expand(*batch, rank).contiguous()
    length = rows if noise.height is None else noise.height
    streams = [noise.stream + k * length for k in range(count)]
    step = noise.step.to(device) if isinstance(noise.step, Tensor) else noise.step
    width = max(BLOCK, triton.next_power_of_2(rank))
    height = max(1, VALUES // width)
    row_tiles = over(rows, height)
    _move[(count * row_tiles,)](
        codes, scale, places, *tables(device, streams),
        square_table(device) if square else signed_tables(device),
        rows, rank, scale.shape[-1], row_tiles, noise.seed, step,
        square, kind, isinstance(step, torch.Tensor), height, width, BLOCK,
        num_warps=4 if width * height <= VALUES else 8,
    )  # fmt: skip
