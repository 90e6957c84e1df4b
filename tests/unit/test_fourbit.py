"""Values in four bits: where they lie, how far they are off, and what is not finite."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.compare import normal
from lowrank_optim.functional import BLOCK_4BIT, dequantize_4bit, quantize_4bit

ROWS = st.integers(1, 4)
WIDTHS = st.integers(1, 210)
SEEDS = st.integers(0, 2**31)


def noise_of(shape, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 65536, shape, dtype=torch.int32, generator=rng)


def by_place(scale: Tensor, cols: int) -> Tensor:
    return scale.repeat_interleave(BLOCK_4BIT, -1)[..., :cols]


@settings(deadline=None, max_examples=60)
@given(WIDTHS, SEEDS, st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]))
def test_keeps_places(cols, seed, size):
    """One value a row comes back where it was, and codes come back as they were."""
    packed, scale = quantize_4bit(torch.eye(cols) * size, noise_of((cols, cols), seed))
    assert packed.shape == (cols, -(-cols // 2))
    assert packed.dtype == torch.int8
    assert scale.shape == (cols, -(-cols // BLOCK_4BIT))
    back = dequantize_4bit(packed, scale)
    torch.testing.assert_close(back[:, :cols], torch.eye(cols) * size, rtol=1e-6, atol=0)
    assert not back[:, cols:].any()
    codes = noise_of((3, cols), seed).remainder(15).sub(7)
    codes[:, ::BLOCK_4BIT] = -7
    x = codes * size
    back = dequantize_4bit(*quantize_4bit(x, torch.full(x.shape, 32768, dtype=torch.int32)))
    torch.testing.assert_close(back[:, :cols], x, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(ROWS, WIDTHS, SEEDS, st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_errs_by_at_most_one_level(rows, cols, seed, exponent, dtype):
    """And a zero stays zero, as does a block of them."""
    x = normal((rows, cols), seed, torch.float32) * 10**exponent
    x[noise_of(x.shape, seed) < 20000] = 0
    x[0, :BLOCK_4BIT] = 0
    x = x.to(dtype)
    packed, scale = quantize_4bit(x, noise_of(x.shape, seed + 1))
    back = dequantize_4bit(packed, scale)[:, :cols]
    assert ((back - x).abs() <= by_place(scale, cols) / 7 * (1 + 1e-5)).all()
    assert not back[x == 0].any()
    assert (back * x >= 0).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 90), SEEDS, st.floats(-30, 30))
def test_is_right_on_average(cols, seed, exponent):
    """The mean over every noise there is equals x to the noise's last bit."""
    x = normal(cols, seed, torch.float32) * 10**exponent
    noise = torch.arange(65536, dtype=torch.int32).unsqueeze(-1).expand(-1, cols)
    packed, scale = quantize_4bit(x.expand(65536, -1), noise)
    mean = dequantize_4bit(packed, scale, torch.float64)[:, :cols].mean(0)
    assert ((mean - x).abs() <= by_place(scale[0], cols) / 7 * 2 / 65536).all()


@settings(deadline=None, max_examples=60)
@given(WIDTHS, SEEDS, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_keeps_what_is_not_finite_within_its_block(cols, seed, bad):
    x = normal((2, cols), seed, torch.float32)
    noise = noise_of(x.shape, seed)
    before = dequantize_4bit(*quantize_4bit(x, noise))[:, :cols]
    place = seed % cols
    x[1, place] = bad
    after = dequantize_4bit(*quantize_4bit(x, noise))[:, :cols]
    block = torch.arange(cols) // BLOCK_4BIT == place // BLOCK_4BIT
    assert not after[1, block].isfinite().any()
    assert torch.equal(after[1, ~block], before[1, ~block])
    assert torch.equal(after[0], before[0])
