"""Moments in 8 bits: the format of `functional.quantize_blockwise` and `quantize_squares`.

A value is found in the table by arithmetic: its decade by its bits, its place in the decade by
one multiplication, which is off by at most one; one comparison each way with the table itself then
gives the very code that the reference finds by search.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import peaks
from ._host import over, upload

BLOCK = 256
LEVELS = 65536.0
LEAST_SCALE = tl.constexpr(1e-38)
TINY = tl.constexpr(1.1754943508222875e-38)
FLOOR = tl.constexpr(6)


@cache
def signed_tables(device: torch.device) -> Tensor:
    """Return the signed map and the 255 middles between its values, float32 `(2, 256)`."""
    table = dynamic_map(True)
    middles = (table[:-1] + table[1:]) * 0.5
    whole = torch.stack((table, torch.cat((middles, middles.new_tensor([torch.inf])))))
    return upload(whole, device)


@cache
def square_table(device: torch.device) -> Tensor:
    """Return the squares of the unsigned map, and 2^16 over their distances: `(2, 256)`."""
    squares = dynamic_map(False).square()
    gains = LEVELS / squares.diff()
    return upload(torch.stack((squares, torch.cat((gains, gains[-1:])))), device)


def dynamic_map(signed: bool) -> Tensor:
    """Return the 256 values of the dynamic map: see `functional.dynamic_map`."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for k in range(7):
        parts = 2 ** (k + (not signed))
        ends = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (k - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@triton.jit
def decade_of(x):
    """Return k in 0..6 with 10^(k-7) <= x < 10^(k-6), and 10^(6-k) x: the decade of x in [0, 1].

    The bits of a float are its logarithm, up to 0.026 decades too small: with 0.0296 more, k is
    right or one too large, which the second number tells. Beside a power of ten k may be the
    neighbour; the place in it is then its end on that side.
    """
    # x, k and what is returned are of one shape, any
    k = ((x.to(tl.int32, bitcast=True) >> 16) * 2466 - 32716840) >> 20
    k = tl.minimum(tl.maximum(k, 0), 6)
    inside = x * tl.exp2((6 - k).to(tl.float32) * 3.3219280948873623)
    less = (inside < 0.1) & (k > 0)
    return k - less.to(tl.int32), tl.where(less, inside * 10.0, inside)


@triton.jit
def place_of(x, PER_DECADE: tl.constexpr):
    """Return the place of x in [0, 1] among the positive values, from 0; it may be off by one."""
    k, inside = decade_of(x)  # of the shape of x, any, as all below
    count = PER_DECADE << k
    inside = ((inside - 0.1) * (count.to(tl.float32) * (1.0 / 0.9))).to(tl.int32)
    inside = tl.minimum(tl.maximum(inside, 0), count - 1)
    return count - PER_DECADE + inside


@triton.jit
def codes_of(x, scale, tables):
    """Return codes, int32, of a tile of blocks of these scales, rounded to nearest."""
    least = tl.maximum(scale, tl.full(scale.shape, LEAST_SCALE, tl.float32))
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), least)
    u = x * inverse[:, None]  # x is (blocks, BLOCK), scale (blocks,)
    place = place_of(tl.minimum(tl.abs(u), 1.0), 1)  # (blocks, BLOCK), as u and all below
    guess = tl.where(u < 0, 126 - place, 128 + place)
    above = tl.load(tables + 256 + guess)
    below = tl.load(tables + 256 + tl.maximum(guess - 1, 0))
    return guess + (above < u).to(tl.int32) - ((guess > 0) & (below >= u)).to(tl.int32)


@triton.jit
def codes_of_squares(v, scale, bits, table):
    """Return codes, int32, of a tile of blocks of squares of these scales, rounded by the bits."""
    divisor = tl.where(scale == 0, 1.0, scale)  # (blocks,)
    # (blocks, BLOCK), as v, bits and all below
    u = tl.div_rn(v, tl.broadcast_to(divisor[:, None], v.shape))
    guess = tl.minimum(1 + place_of(tl.minimum(tl.sqrt(u), 1.0), 2), 254)
    here = tl.load(table + guess)
    above = tl.load(table + guess + 1)
    code = guess - (here > u).to(tl.int32) + ((above <= u) & (guess < 254)).to(tl.int32)
    low = tl.load(table + code)
    gain = tl.load(table + 256 + code)
    code += (bits.to(tl.float32) + 0.5 < (u - low) * gain).to(tl.int32)
    lifted = (v > 0) | (scale == float("inf"))[:, None]
    return tl.where(lifted, tl.maximum(code, FLOOR), code)


@triton.jit
def dequantize_tile(code, scale, tables):
    """Return `map[code] * scale`; the code as integers, the scale to broadcast."""
    # code is (blocks, BLOCK), scale (blocks, 1) or of the shape of code
    return tl.load(tables + code.to(tl.int32)) * scale


@triton.jit
def dequantize_squares_tile(code, scale, table):
    """Return `square_map[code] * scale`, at least the least normal number unless one is 0."""
    # code is (blocks, BLOCK), scale (blocks, 1) or of the shape of code
    value = tl.load(table + code.to(tl.int32)) * scale
    return tl.where((code > 0) & (scale > 0), tl.maximum(value, TINY), value)


@triton.jit(do_not_specialize=["blocks"])
def _quantize(
    x, bits, codes, scales, tables, rows, cols, blocks,
    SQUARES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Code one tile: a block of some rows."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    col = block * WIDTH + tl.arange(0, WIDTH)
    at = row[:, None] * cols + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # (HEIGHT, WIDTH): a block a row
    if SQUARES:
        noise = tl.load(bits + at, mask=inside, other=0)  # (HEIGHT, WIDTH)
        scale = peaks(value)  # (HEIGHT,)
        code = codes_of_squares(value, scale, noise, tables)
    else:
        scale = peaks(tl.abs(value))
        code = codes_of(value, scale, tables)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    tl.store(scales + row * blocks + block, scale, mask=row < rows)


@triton.jit(do_not_specialize=["blocks"])
def _dequantize(
    codes, scales, out, tables, rows, cols, blocks,
    SQUARES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decode one tile: a block of some rows."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    col = block * WIDTH + tl.arange(0, WIDTH)
    at = row[:, None] * cols + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    code = tl.load(codes + at, mask=inside, other=0)  # (HEIGHT, WIDTH)
    scale = tl.load(scales + row * blocks + block, mask=row < rows, other=0.0)  # (HEIGHT,)
    if SQUARES:
        value = dequantize_squares_tile(code, scale[:, None], tables)
    else:
        value = dequantize_tile(code, scale[:, None], tables)
    tl.store(out + at, value, mask=inside)


def quantize_blockwise(x: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return (codes, scale): see `functional.quantize_blockwise`; the signed map only."""
    if not signed:
        raise ValueError("kernels quantise with the signed map; squares by quantize_squares")
    return _launch_quantize(x, x, signed_tables(x.device), False)


def quantize_squares(v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) of averages of squares: see `functional.quantize_squares`."""
    return _launch_quantize(v, noise.contiguous(), square_table(v.device), True)


def dequantize_blockwise(
    codes: Tensor, scale: Tensor, signed: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return `map[code] * scale`: see `functional.dequantize_blockwise`; the signed map only."""
    if not signed:
        raise ValueError("kernels quantise with the signed map; squares by quantize_squares")
    return _launch_dequantize(codes, scale, dtype, signed_tables(codes.device), False)


def dequantize_squares(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `square_map[code] * scale`: see `functional.dequantize_squares`."""
    return _launch_dequantize(codes, scale, dtype, square_table(codes.device), True)


def _launch_quantize(
    x: Tensor, bits: Tensor, tables: Tensor, squares: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    cols = x.shape[-1]
    rows, blocks = x.numel() // max(1, cols), -(-cols // BLOCK)
    codes = torch.empty_like(x, dtype=torch.uint8)
    scale = torch.empty((*x.shape[:-1], blocks), dtype=torch.float32, device=x.device)
    if x.numel():
        grid = (over(rows, 4) * blocks,)
        _quantize[grid](
            x, bits, codes, scale, tables, rows, cols, blocks, squares, 4, BLOCK, num_warps=4
        )
    return codes, scale


def _launch_dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, tables: Tensor, squares: bool
) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    cols = codes.shape[-1]
    rows, blocks = codes.numel() // max(1, cols), -(-cols // BLOCK)
    out = torch.empty_like(codes, dtype=dtype)
    if codes.numel():
        grid = (over(rows, 4) * blocks,)
        _dequantize[grid](
            codes, scale, out, tables, rows, cols, blocks, squares, 4, BLOCK, num_warps=4
        )
    return out
