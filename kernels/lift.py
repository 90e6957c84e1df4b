"""The lift product with the whole update of the weight as its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import address, dot, halves, narrow, number, random_bits, stochastic_round
from ._host import addresses, aligned, numbers, over, precision, rates, roomy, tables, tl_type

WEIGHT = tl.constexpr(0)


class Tile(NamedTuple):
    """What a program works on at once.

    Attributes:
        rows: of the weight.
        cols: of the weight.
        rank: columns of rank that one product takes.
        piece: columns of the weight that are finished at once.
        warps: of a program.
        stages: of loads on their way.
    """

    rows: int
    cols: int
    rank: int
    piece: int
    warps: int
    stages: int


@lru_cache(maxsize=256)
def tile_of(
    shape: tuple[int, int], rank: int, half: bool, signed: bool, indexed: bool, room: bool
) -> Tile:
    """Return the tile: the one place that decides it.

    Per parameter: 2 r flops; from memory W twice, 4 bytes, and N, 2 r / n; from the second-level
    cache 2 r / rows of P and 2 r / cols of N. On an H200, see `project.tile_of`, in ps for
    n = 4096, r = 256, 512, 1024:

        products              0.65  1.30  2.59
        memory                0.96  0.99  1.05
        second level, 128^2   1.33  2.67  5.33
        second level, 128x256 1.00  2.00  4.00

    With 128^2, two programs share a multiprocessor (128 registers a thread), one reading and
    writing W while the other multiplies; 128 registers are enough for pieces of 16 columns.
    With room for more on their way, products of 64 columns of rank and larger pieces, whose rows
    are whole lines of memory, are faster. Measured on an H200, ms for all matrices of LLaMA-7B:

        rows x cols, rank, piece, warps        r = 1024     256
        128 x 256, 32, 16, 8                       37.2    21.7
        128 x 128, 32, 16, 8                       30.6    16.2
        128 x 128, 64, 32, 4                       28.8    14.0
        128 x 128, 64, 64, 8                       26.0       -
        with the sign: 64 x 128, 32, 32, 8         60.8    27.4
        64 x 128, 64, 32, 4                        54.5    26.8
        64 x 128, 64, 64, 4                        51.2       -

    The sign term keeps sums of its own. No tile is much larger than the matrix.
    """
    height, width = (max(16, triton.next_power_of_2(size)) for size in shape)
    if indexed:
        tile = Tile(32, 128, 32, 128, 8, 2)
    elif not half:
        tile = Tile(64, 64, 32, 32, 4, 2)
    elif room and signed:
        tile = Tile(64, 128, 64, 64, 4, 3)
    elif room:
        tile = Tile(128, 128, 64, 64, 8, 3) if rank > 512 else Tile(128, 128, 64, 32, 4, 3)
    elif signed:
        tile = Tile(64, 128, 32, 32, 8, 4)
    else:
        tile = Tile(128, 128, 32, 16, 8, 4)
    rows, cols = min(tile.rows, height), min(tile.cols, width)
    warps = tile.warps if rows * cols >= 4096 else 4
    return tile._replace(rows=rows, cols=cols, piece=min(tile.piece, cols), warps=warps)


@triton.jit
def coefficient(x, k, row, rows, PER_ROW: tl.constexpr):
    """Return a factor as something to broadcast: a number, or a column of one a row."""
    if PER_ROW:  # row is (ROWS,), the result (ROWS, 1)
        return tl.load(x + k.to(tl.int64) * rows + row, mask=row < rows, other=0.0)[:, None]
    else:
        return x


@triton.jit
def _write(
    update, kept, first, weights, grads, places, streams, low_in, direction_in,
    k, row, rows, cols, rank, w_row, w_col, g_row, g_col, seed, step, a, share, phi, c,
    step_size, decay,
    W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, INDEXED: tl.constexpr, LOW: tl.constexpr,
    DIRECTION: tl.constexpr, GRAD: tl.constexpr, GRAD_ROWS: tl.constexpr, SIGN: tl.constexpr,
    ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Do all that follows the products, piece by piece: one at a time has room in registers."""
    if update.shape[1] > PIECE:  # update and kept are (ROWS, width)
        left, right = halves(update)  # (ROWS, width / 2) each
        kept_left, kept_right = left, right
        if SIGN:
            kept_left, kept_right = halves(kept)
        _write(
            left, kept_left, first, weights, grads, places, streams, low_in, direction_in,
            k, row, rows, cols, rank, w_row, w_col, g_row, g_col, seed, step, a, share, phi, c,
            step_size, decay, W_TYPE, G_TYPE, INDEXED, LOW, DIRECTION, GRAD, GRAD_ROWS, SIGN,
            ROUNDS, ALIGNED, PIECE,
        )  # fmt: skip
        _write(
            right, kept_right, first + left.shape[1], weights, grads, places, streams, low_in,
            direction_in, k, row, rows, cols, rank, w_row, w_col, g_row, g_col, seed, step, a,
            share, phi, c, step_size, decay, W_TYPE, G_TYPE, INDEXED, LOW, DIRECTION, GRAD,
            GRAD_ROWS, SIGN, ROUNDS, ALIGNED, PIECE,
        )  # fmt: skip
    else:
        col = (first + tl.arange(0, update.shape[1])).to(tl.int64)
        inside = (row[:, None] < rows) & (col[None, :] < cols)  # (ROWS, PIECE), as update
        if INDEXED:
            # (PIECE,): which column of R and N lifts to this one, -1 for none
            place = tl.load(places + k.to(tl.int64) * cols + col, mask=col < cols, other=-1)
            chosen = inside & (place[None, :] >= 0)
            # (ROWS, PIECE), as chosen, into R and N of (K, rows, rank)
            at = (k.to(tl.int64) * rows + row[:, None]) * rank + place[None, :]
            if DIRECTION:
                update += a * tl.load(direction_in + at, mask=chosen, other=0.0).to(tl.float32)
            if LOW:
                update += share * tl.load(low_in + at, mask=chosen, other=0.0).to(tl.float32)
        if GRAD or SIGN:
            g_at = address(grads, k, G_TYPE, ALIGNED) + row[:, None] * g_row + col[None, :] * g_col
            g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)  # (ROWS, PIECE)
            if GRAD:
                update += coefficient(phi, k, row, rows, GRAD_ROWS) * g
            if SIGN:
                if INDEXED:
                    dropped = tl.where(place[None, :] >= 0, 0.0, g)
                else:
                    dropped = g - kept
                update += c * ((dropped > 0).to(tl.float32) - (dropped < 0).to(tl.float32))
        w_at = address(weights, k, W_TYPE, ALIGNED) + row[:, None] * w_row + col[None, :] * w_col
        w = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)  # (ROWS, PIECE)
        w = decay * w + step_size * update
        if ROUNDS:
            bits = random_bits(  # (ROWS, PIECE)
                seed, step, tl.load(streams + k), row, first, WEIGHT, update.shape[1]
            )  # fmt: skip
            tl.store(w_at, stochastic_round(w, bits), mask=inside)
        else:
            tl.store(w_at, narrow(w, W_TYPE), mask=inside)


@triton.jit(do_not_specialize=["seed", "step", "row_tiles", "col_tiles"])
def _lift(
    weights, grads, factors, places, streams, low_in, direction_in, lengths,
    rows, cols, rank, row_tiles, col_tiles, w_row, w_col, g_row, g_col, f_col, f_rank,
    seed, step, a, b, phi, c, step_size, decay,
    W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, F_TYPE: tl.constexpr,
    INDEXED: tl.constexpr, LOW: tl.constexpr, DIRECTION: tl.constexpr,
    LOW_ROWS: tl.constexpr, GRAD: tl.constexpr, GRAD_ROWS: tl.constexpr, SIGN: tl.constexpr,
    COUNTED: tl.constexpr, RATED: tl.constexpr, LONG: tl.constexpr, ROUNDS: tl.constexpr,
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
    update = tl.zeros((ROWS, COLS), dtype=tl.float32)
    share = a
    if LOW:
        share = coefficient(b, k, row, rows, LOW_ROWS)
    kept = update
    if SIGN:
        kept = tl.zeros((ROWS, COLS), dtype=tl.float32)
    if not INDEXED and (DIRECTION or LOW or SIGN):
        f_at = address(factors, k, F_TYPE, ALIGNED) + col[None, :] * f_col
        for start in range(0, rank, RANK):
            lane = start + tl.arange(0, RANK)  # (RANK,); mask is (ROWS, RANK)
            in_rank = lane[None, :] < rank
            mask = in_rows & in_rank
            p = tl.load(  # (RANK, COLS): a piece of P^T
                f_at + lane[:, None].to(tl.int64) * f_rank,
                mask=in_cols & (lane[:, None] < rank), other=0.0,
            )  # fmt: skip
            p = narrow(p.to(tl.float32), G_TYPE)
            if LOW or SIGN:
                low = tl.load(low_in + base + lane[None, :], mask=mask, other=0.0)  # (ROWS, RANK)
            if DIRECTION:
                n = tl.load(direction_in + base + lane[None, :], mask=mask, other=0.0)
                update = dot(narrow(n.to(tl.float32), G_TYPE), p, update, PRECISION)
            elif LOW:
                inner = narrow(share * low.to(tl.float32), G_TYPE)
                update = dot(inner, p, update, PRECISION)
            if SIGN:
                kept = dot(narrow(low.to(tl.float32), G_TYPE), p, kept, PRECISION)
        if DIRECTION:
            update *= a
    step_size = number(step_size, 0, RATED)
    if LONG:
        step_size *= tl.load(lengths + k)
    _write(
        update, kept, first, weights, grads, places, streams, low_in, direction_in,
        k, row, rows, cols, rank, w_row, w_col, g_row, g_col,
        seed, number(step, k, COUNTED).to(tl.uint32), a, share, phi, c,
        step_size, number(decay, 0, RATED),
        W_TYPE, G_TYPE, INDEXED, LOW, DIRECTION, GRAD, GRAD_ROWS, SIGN, ROUNDS, ALIGNED, PIECE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _blend(
    direction, low, a, b, rows, rank, TYPE: tl.constexpr, LOW_ROWS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Put a N + b R in place of N: one tile of all rows of all matrices."""
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)  # (WIDTH,); row is (HEIGHT,)
    at = row[:, None] * rank + lane[None, :]  # (HEIGHT, WIDTH), as inside, n and r
    inside = (row[:, None] < rows) & (lane[None, :] < rank)
    n = tl.load(direction + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    share = b
    if LOW_ROWS:
        share = tl.load(b + row, mask=row < rows, other=0.0)[:, None]  # (HEIGHT, 1)
    tl.store(direction + at, narrow(a * n + share * r, TYPE), mask=inside)


def lift_write(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    low: Tensor | None,
    direction: Tensor | None,
    update: Any,
    step_size: float | Tensor,
    decay: float | Tensor,
    noises: Sequence[Any] | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Apply updates to weights in place: see `functional.lift_write`.

    One launch for all, one read of G where it is needed, one read and one write of W. Tensors of
    one list have one shape and strides; `low` and `direction` are contiguous, in the dtype of the
    gradients; `lengths` is float32 and contiguous, and is read on the device. The sign term keeps
    `R P^T` in float32: where it is almost G, the sign of the difference may differ from the
    reference's. Where both `direction` and `low` would be multiplied by a basis, their sum is
    multiplied instead; it takes the place of `direction`.
    """
    param, grad, factor = params[0], grads[0], factors[0]
    (rows, cols), device = param.shape, param.device
    uses_direction = direction is not None and update.direction != 0
    uses_low = low is not None and (isinstance(update.low, Tensor) or update.low != 0)
    uses_grad = isinstance(update.grad, Tensor) or update.grad != 0
    indexed = factor.ndim == 1
    half = grad.dtype != torch.float32
    tile = tile_of((rows, cols), factor.shape[-1], half, bool(update.sign), indexed, roomy(device))
    row_tiles, col_tiles = over(rows, tile.rows), over(cols, tile.cols)
    steps, counted = numbers([noise.step for noise in noises]) if noises else (0, False)
    step_size, decay, rated = rates(step_size, decay)
    b, phi = (
        x.contiguous() if isinstance(x, Tensor) else float(x) for x in (update.low, update.grad)
    )
    a = float(update.direction)
    if uses_direction and uses_low and not indexed:
        blend(direction, low, a, b)
        a, uses_low = 1.0, False
    rounds = noises is not None and param.dtype == torch.bfloat16
    places = addresses(params), addresses(grads), addresses(factors)
    streams = [noise.stream for noise in noises] if noises else [0] * len(params)
    *moved, stream_table = tables(device, *places, streams)
    _lift[(len(params) * row_tiles * col_tiles,)](
        *moved, places_of(factors, cols) if indexed else None, stream_table, low, direction,
        lengths, rows, cols, factor.shape[-1], row_tiles, col_tiles,
        *param.stride(), *grad.stride(),
        *((1, 1) if indexed else factor.stride()),
        noises[0].seed if noises else 0, steps, a, b, phi,
        float(update.sign), step_size, decay,
        tl_type(param), tl_type(grad), tl_type(factor), indexed, uses_low, uses_direction,
        isinstance(b, Tensor), uses_grad, isinstance(phi, Tensor), bool(update.sign),
        counted, rated, lengths is not None, rounds, aligned(*places), precision(),
        tile.rows, tile.cols, tile.rank, tile.piece, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def blend(direction: Tensor, low: Tensor, a: float, b: float | Tensor) -> None:
    """Put a N + b R in place of N, all `(K, rows, rank)`; b is a number or one a row.

    A pass of 6 r bytes a row, so that the product reads one operand, not two through registers: a
    step of LLaMA-7B at r = 1024 on an H200 took 59 to 68 ms with two, and takes 26 with one.
    """
    rows, rank = direction.shape[0] * direction.shape[1], direction.shape[2]
    _blend[(over(rows, 4), over(rank, 256))](
        direction, low, a, b, rows, rank, tl_type(direction), isinstance(b, Tensor), 4, 256,
        num_warps=4,
    )  # fmt: skip


def places_of(factors: Sequence[Tensor], cols: int) -> Tensor:
    """Return for each column its place among the chosen ones, or -1: int32 `(K, cols)`."""
    index = torch.stack(list(factors))
    places = torch.full((len(factors), cols), -1, dtype=torch.int32, device=index.device)
    lanes = torch.arange(index.shape[1], dtype=torch.int32, device=index.device)
    return places.scatter_(1, index, lanes.expand_as(index))
