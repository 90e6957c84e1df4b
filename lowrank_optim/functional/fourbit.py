"""Values in four bits: a block of a row shares a float32 scale, two values share a byte.

Column j of a row lies in byte j // 2, in its low half where j is even. The last byte of an odd row
has a zero in its high half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_4BIT = 64
"""Values that share a scale; even, so that no byte lies in two blocks."""

LEVELS = 7
"""Codes go from -7 to 7."""


def quantize_4bit(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (packed, scale), rounded stochastically: the expectation is x.

    With s = max|x| of the block and u = 7 x / s:  code = floor(u + (noise + 0.5) / 65536)
    A block with an infinity or a nan decodes to nans. Where s is below 1e-37, values come out
    smaller than they are.

    Args:
        x: `(..., cols)`, a floating dtype.
        noise: int32 of x's shape, each of 0 .. 65535 with equal probability.

    Returns:
        int8 `(..., ceil(cols / 2))` and float32 `(..., ceil(cols / 64))`.
    """
    cols = x.shape[-1]
    blocks = F.pad(x.to(torch.float32), (0, -cols % BLOCK_4BIT))
    blocks = blocks.view(*x.shape[:-1], -(-cols // BLOCK_4BIT), BLOCK_4BIT)
    scale = blocks.abs().amax(-1)
    unit = blocks * (LEVELS / scale.clamp_min(1e-37)).unsqueeze(-1)
    places = unit.flatten(-2)[..., :cols]
    codes = (places + (noise.to(torch.float32) + 0.5) / 65536).floor().clamp(-LEVELS, LEVELS)
    whole = F.pad(codes.nan_to_num().to(torch.int8), (0, cols % 2))
    pairs = whole.view(*x.shape[:-1], -(-cols // 2), 2)
    packed = (pairs[..., 0] & 15) | (pairs[..., 1] << 4)
    return packed, scale


def dequantize_4bit(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values in `dtype`, `(..., 2 * bytes)`: of an odd row, one zero more.

    value = code * s / 7
    """
    low = (packed << 4) >> 4
    codes = torch.stack([low, packed >> 4], -1).flatten(-2)
    spread = scale.repeat_interleave(BLOCK_4BIT, -1)[..., : codes.shape[-1]]
    return (codes.to(torch.float32) * (spread / LEVELS)).to(dtype)
