"""Random bits in memory, for roundings that are not part of a kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import number
from ._device import random_bits as bits_of
from ._host import over, tables

HEIGHT, WIDTH = 8, 256


@triton.jit(do_not_specialize=["seed", "step", "first", "rows", "blocks"])
def _bits(
    out, streams, seed, step, first, rows, cols, blocks,
    KIND: tl.constexpr, COUNTED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the bits of one tile."""
    row = tl.program_id(0) // blocks * HEIGHT + tl.arange(0, HEIGHT)
    col = tl.program_id(0) % blocks * WIDTH
    count = number(step, 0, COUNTED).to(tl.uint32)
    bits = bits_of(seed, count, tl.load(streams), first + row, col, KIND, WIDTH)  # (HEIGHT, WIDTH)
    lane = col + tl.arange(0, WIDTH)
    at = row[:, None].to(tl.int64) * cols + lane[None, :]
    tl.store(out + at, bits, mask=(row[:, None] < rows) & (lane[None, :] < cols))


def random_bits(noise: Any, kind: int, rows: slice, cols: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each element of some rows: see `functional.random_bits`."""
    count = rows.stop - rows.start
    out = torch.empty(count, cols, dtype=torch.int32, device=device)
    if not out.numel():
        return out
    step = noise.step
    if isinstance(step, Tensor):
        step = step.to(device)
    blocks = over(cols, WIDTH)
    _bits[(over(count, HEIGHT) * blocks,)](
        out, *tables(device, [noise.stream]), noise.seed, step, rows.start, count, cols, blocks,
        kind, isinstance(step, Tensor), HEIGHT, WIDTH, num_warps=4,
    )  # fmt: skip
    return out
