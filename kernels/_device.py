"""What the kernels share on the device: addresses, run-time numbers, random bits, rounding."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter cuts float32 off to bfloat16 and multiplies its bit patterns (3.9)."""

GROUPS_OF_KIND = tl.constexpr(1 << 29)


@triton.jit
def address(table, k, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the k-th pointer of a table, as one to `dtype`.

    The compiler knows nothing of an integer that became a pointer, whatever it is told about the
    integer, and would load element by element. What it does see through is a pointer that is known
    to be aligned (the table: every allocation is) plus a multiple of 16 bytes.
    """
    number = tl.load(table + k)
    if ALIGNED:
        far = (number - table.to(tl.int64)) >> 4
        base = table.to(tl.pointer_type(dtype), bitcast=True)
        return base + far * (128 // dtype.primitive_bitwidth)
    else:
        return number.to(tl.pointer_type(dtype))


@triton.jit
def number(x, k, ON_DEVICE: tl.constexpr):
    """Return a run-time number: a value, or the k-th of a tensor in device memory."""
    if ON_DEVICE:
        return tl.load(x + k)
    else:
        return x


@triton.jit
def halves(x):
    """Return the left and the right half of a tile: of registers, where they hold a product."""
    # (rows, cols) -> (rows, 2, cols / 2) -> (rows, cols / 2, 2), split along its last axis
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def random_bits(seed, count, stream, row, col, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Return 16 random bits for each element of a tile, int32: see `functional.random_bits`.

    Args:
        seed: 64 bits.
        count: number of the update.
        stream: `position << 32 | first row`.
        row: rows of the tile in the matrix, a vector.
        col: first column of the tile, a multiple of 8.
        KIND: what the bits are for.
        WIDTH: columns of the tile, a multiple of 8.
    """
    group = (col // 8 + tl.arange(0, WIDTH // 8)).to(tl.uint32) | KIND * GROUPS_OF_KIND
    line = ((stream & 0xFFFFFFFF) + row).to(tl.uint32)
    zero = tl.zeros((row.shape[0], WIDTH // 8), dtype=tl.uint32)
    position = (stream >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(
        seed, zero + group[None, :], zero + line[:, None], zero + position, zero + count
    )
    # a to d are (rows, WIDTH / 8), a word for two columns each
    words = tl.join(tl.join(a, c), tl.join(b, d))  # (rows, WIDTH / 8, 2, 2): words a to d
    halves = tl.join(words & 0xFFFF, words >> 16)  # (rows, WIDTH / 8, 2, 2, 2)
    return halves.reshape(row.shape[0], WIDTH).to(tl.int32)


@triton.jit
def stochastic_round(x, bits):
    """Round float32 to bfloat16 up or down at random: see `functional.stochastic_round`."""
    # x, bits and the result are of one shape, any
    moved = ((x.to(tl.int32, bitcast=True) + bits) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), moved, x).to(tl.bfloat16)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """Round float32 to nearest, ties to even."""
    # x and the result are of one shape, any
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(tl.abs(x) < float("inf"), near.to(tl.float32, bitcast=True), x).to(TYPE)
    else:
        return x.to(TYPE)


@triton.jit
def peaks(x):
    """Return the largest value of each row; nan where one is, which `tl.max` would drop."""
    bad = tl.max((x != x).to(tl.int32), axis=1) > 0  # x is (rows, cols), this (rows,)
    return tl.where(bad, float("nan"), tl.max(x, axis=1))


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return `total + a b`, summed in float32."""
    # a is (rows, inner), b (inner, cols), total and the result (rows, cols)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
