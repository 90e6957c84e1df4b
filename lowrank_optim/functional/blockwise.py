"""Moments in 8 bits: blocks of a row share a float32 scale, and codes index a table of 256 values.

A row is the last axis; its blocks have `BLOCK` values, the last one of a row what is left.
`codes` is uint8 of the shape of the values, `scale` float32 `(..., ceil(cols / BLOCK))`.
All arithmetic is float32, each operation rounded once (IEEE, no fused multiply-add, denormals
kept), so that a kernel can give the same bytes; other dtypes are converted to float32 first.

Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization",
    arXiv 2110.02861.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import upload

BLOCK = 256
"""Values that share a scale."""

FLOOR = 6
"""The least code of a positive average of squares: a root of 8.9e-6 of the block's largest.

Below it exp_avg has three codes left, and its error over a root that small is a large step.
"""

LEVELS = 1 << 16
"""Numbers of which `noise` is one, for stochastic rounding."""


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 float32 values of the dynamic 8-bit map, ascending; do not modify it.

    0, 1, and for each decade 10^(k-6) .. 10^(k-5), k = 0..6, the middles of 2^k equal intervals,
    with both signs; without sign, of 2^(k+1) intervals.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for k in range(7):
        ends = torch.linspace(
            0.1, 1, 2 ** (k + (not signed)) + 1, dtype=torch.float32, device="cpu"
        )
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (k - 6)
        values += [middles, -middles] if signed else [middles]
    return upload(torch.cat(values).sort().values, device)


@cache
def square_map(device: torch.device) -> Tensor:
    """Return the squares of the unsigned map, 0 and 1e-13 .. 1, in float32; do not modify it."""
    return dynamic_map(False, device).square()


def quantize_blockwise(x: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) in the dynamic map, each value rounded to the nearest code.

    With a = max|x| of the block, nan if it has one:
        i = 1 / max(a, 1e-38);  u = x * i;  code = count of (map[j] + map[j+1]) * 0.5 below u
    A tie goes to the lower value. Zero decodes to 0. A block with an infinity or a nan decodes to
    infinities and nans only.

    Args:
        x: `(..., cols)`, a floating dtype.
        signed: which map.

    The codes are those that bitsandbytes documents and its portable code makes. Its code for CPUs
    (0.50) rounds to 65536 equal steps first and so turns 0 into 2e-5 a: beside a second moment of 0
    that is a step a thousand times too long, and not repeated here.
    """
    table = dynamic_map(signed, x.device)
    blocks, scale = _blocks(x)
    scaled = blocks * (1 / scale.clamp_min(1e-38)).unsqueeze(-1)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) * 0.5, out_int32=True).clamp_max(255)
    return _rows(codes, x), scale


def dequantize_blockwise(
    codes: Tensor, scale: Tensor, signed: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return `map[code] * scale`, multiplied in float32 and rounded to `dtype`."""
    table = dynamic_map(signed, codes.device)
    return (_look(table, codes) * _spread(scale, codes)).to(dtype)


def quantize_squares(
    v: Tensor, noise: Tensor | None = None, floor: int = FLOOR
) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) of averages of squares in the squared map; v > 0 never becomes 0.

    With s = max v of the block, t = `square_map` and, of each c in 0..254, the float32
    f[c] = 65536 / (t[c+1] - t[c]):
        u = v / s  (a division, correctly rounded; 0 where s is 0)
        c = min(max(count of t below or at u, 1) - 1, 254)
        p = (u - t[c]) * f[c]
        code = c + 1 if noise + 0.5 < p else c;  code = max(code, floor) where v > 0 or s = inf
    The expectation of the decoded value is v to within 2^-17 of the gap, where v / s is at least
    t[floor] (7.9e-11 for 6). The largest of a block is kept exactly. Values below 0 are stored
    as 0. A block with an infinity decodes to infinities, one with a nan to nans only.

    Args:
        v: `(..., cols)`, a floating dtype.
        noise: int32 of v's shape, each of 0 .. 65535 with equal probability; None rounds to the
            nearest square, as noise 32767 would.
        floor: at least 1.
    """
    noise = torch.full_like(v, LEVELS // 2 - 1, dtype=torch.int32) if noise is None else noise
    codes, scale = _between(v, square_map(v.device), noise)
    lifted = (v.to(torch.float32) > 0) | _spread(scale, codes).isinf()
    return torch.where(lifted, codes.clamp_min(floor), codes), scale


def dequantize_squares(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `square_map[code] * scale`, in float32, at least 2^-126 unless one of them is 0.

    `dtype` has to have the range of float32.
    """
    spread = _spread(scale, codes)
    value = _look(square_map(codes.device), codes) * spread
    floor = torch.finfo(torch.float32).tiny
    return torch.where((codes > 0) & (spread > 0), value.clamp_min(floor), value).to(dtype)


def _between(x: Tensor, table: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scale), each code the neighbour below or above that the noise picks."""
    blocks, scale = _blocks(x)
    scaled = blocks / torch.where(scale == 0, 1, scale).unsqueeze(-1)
    below = torch.bucketize(scaled, table, right=True, out_int32=True).sub_(1).clamp_(0, 254)
    gain = LEVELS / (table[1:] - table[:-1])
    place = (scaled - _look(table, below)).mul_(_look(gain, below))
    return _rows(below, x) + (noise.to(torch.float32) + 0.5 < _rows(place, x, torch.float32)), scale


def _look(table: Tensor, index: Tensor) -> Tensor:
    """Return `table[index]`; `index_select` is several times faster than indexing on a CPU."""
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape)


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as float32 `(..., blocks, BLOCK)`, padded with zeros, and max|x| of each block."""
    cols = x.shape[-1]
    padded = F.pad(x.to(torch.float32), (0, -cols % BLOCK))
    blocks = padded.reshape(*_scale_shape(x), BLOCK)
    return blocks, blocks.abs().amax(dim=-1)


def _rows(blocks: Tensor, like: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Undo `_blocks` in shape."""
    rows = blocks.to(dtype).reshape(*like.shape[:-1], blocks.shape[-2] * BLOCK)
    return rows[..., : like.shape[-1]].contiguous()


def _spread(scale: Tensor, codes: Tensor) -> Tensor:
    """Repeat each block's scale for its codes."""
    return scale.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]


def _scale_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales of x."""
    return (*x.shape[:-1], -(-x.shape[-1] // BLOCK))
