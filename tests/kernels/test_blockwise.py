"""The storage of moments in 8 bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim.functional.blockwise import (
    BLOCK,
    FLOOR,
    LEVELS,
    dequantize_blockwise,
    dequantize_squares,
    dynamic_map,
    quantize_blockwise,
    quantize_squares,
    square_map,
)

CPU = torch.device("cpu")
SIGNS = pytest.mark.parametrize("signed", [True, False])
SHAPES = [(1,), (3, 1), (2, 255), (2, 64), (1, 65), (4, 128), (3, 129), (2, 3, 300), (2, 512)]


def sample(shape: tuple[int, ...], seed: int, signed: bool = True, spread: float = 8) -> Tensor:
    """Values of a log-uniform scale, some of them 0."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng) * 10 ** (-spread * torch.rand(shape, generator=rng))
    x = torch.where(torch.rand(shape, generator=rng) < 0.05, 0, x)
    return x if signed else x.abs()


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, LEVELS, shape, dtype=torch.int32, generator=rng)


def gaps(table: Tensor, scaled: Tensor) -> Tensor:
    """The gap between the two codes around each value; beyond the ends, twice the distance."""
    at = torch.bucketize(scaled, table).clamp(1, 255)
    beyond = 2 * (table[0] - scaled).clamp_min(0)
    return torch.maximum(table[at] - table[at - 1], beyond)


def by_blocks(x: Tensor, scale: Tensor) -> Tensor:
    """Scales of the values, 1 where 0."""
    spread = scale.repeat_interleave(BLOCK, dim=-1)[..., : x.shape[-1]]
    return torch.where(spread == 0, 1, spread)


@SIGNS
def test_map_is_that_of_bitsandbytes(signed: bool) -> None:
    from bitsandbytes import functional as peer

    assert torch.equal(dynamic_map(signed, CPU), peer.create_dynamic_map(signed=signed))


@SIGNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(256,), (5, 512), (2, 3, 768)])
def test_bytes_are_those_of_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, signed: bool
) -> None:
    """Its CPU code first rounds to 65536 equal steps; with that done to our input, byte by byte."""
    from bitsandbytes import functional as peer

    x = sample(shape, 0, signed).to(dtype)
    table = peer.create_dynamic_map(signed=signed)
    wanted, state = peer.quantize_blockwise(x.float(), code=table, blocksize=256)
    scale = state.absmax.view(*shape[:-1], -1)
    steps = torch.arange(65536) / 65535 * 2 - 1
    scaled = (x.float() * (1 / by_blocks(x, scale))).clamp(-1, 1)
    codes, unit = quantize_blockwise(steps[((scaled + 1) * 32767.5 + 0.5).long()], signed)
    assert torch.equal(unit, torch.ones_like(scale))
    assert torch.equal(codes, wanted)
    assert torch.equal(quantize_blockwise(x, signed)[1], scale)
    decoded = peer.dequantize_blockwise(codes, absmax=state.absmax, code=table, blocksize=256)
    assert torch.equal(dequantize_blockwise(codes, scale, signed), decoded)


@pytest.mark.gpu
def test_bytes_are_those_of_bitsandbytes_on_a_gpu() -> None:
    peer = pytest.importorskip("bitsandbytes.functional", reason="a GPU machine may lack it")
    x = sample((64, 1024), 0).cuda()
    wanted, state = peer.quantize_blockwise(x, blocksize=256)
    codes, scale = quantize_blockwise(x)
    assert torch.equal(scale.flatten(), state.absmax)
    assert torch.equal(codes, wanted)


def test_zero_stays_zero_beside_large_values() -> None:
    """An element that never had a gradient must not get a moment from its neighbours."""
    x = torch.zeros(1, 256)
    x[0, 0] = 1.0
    decoded = dequantize_blockwise(*quantize_blockwise(x))
    assert torch.equal(decoded, x)


@SIGNS
@pytest.mark.parametrize("shape", SHAPES)
def test_short_rows_are_as_rows_padded_to_a_block(shape: tuple[int, ...], signed: bool) -> None:
    x = sample(shape, 1, signed)
    padded = torch.nn.functional.pad(x, (0, -shape[-1] % BLOCK))
    codes, scale = quantize_blockwise(x, signed)
    wanted, wanted_scale = quantize_blockwise(padded, signed)
    assert torch.equal(codes, wanted[..., : shape[-1]])
    assert torch.equal(scale, wanted_scale)


@SIGNS
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    cols=st.integers(1, 600),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-25, 30),
)
def test_error_is_at_most_half_the_gap(
    signed: bool, rows: int, cols: int, seed: int, exponent: int
) -> None:
    x = sample((rows, cols), seed, signed) * 10.0**exponent
    codes, scale = quantize_blockwise(x, signed)
    spread = by_blocks(x, scale)
    error = (dequantize_blockwise(codes, scale, signed) - x).abs().double()
    bound = gaps(dynamic_map(signed, CPU), x / spread).double() / 2 * spread
    assert (error <= bound + 1e-6 * x.abs() + 1e-12 * spread).all()
    assert scale.shape == (rows, -(-cols // BLOCK))
    assert (dequantize_blockwise(codes, scale, signed)[x == 0] == 0).all()


def test_nearest_takes_the_lower_of_a_tie_and_keeps_the_codes() -> None:
    table = dynamic_map(True, CPU)
    codes, _ = quantize_blockwise(table, True)
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    middles = (table[:-1] + table[1:]) * 0.5
    codes, _ = quantize_blockwise(torch.cat([middles, torch.ones(1)]), True)
    assert torch.equal(codes[:255], torch.arange(255, dtype=torch.uint8))


@pytest.mark.parametrize("noise", [None, 0, LEVELS - 1])
@settings(max_examples=60, deadline=None)
@given(cols=st.integers(1, 600), seed=st.integers(0, 2**31), exponent=st.integers(-44, 36))
def test_squares_decode_to_0_only_where_they_are_0(
    noise: int | None, cols: int, seed: int, exponent: int
) -> None:
    v = (sample((2, cols), seed, False, 44).double() * 10.0**exponent).float()
    filled = None if noise is None else torch.full(v.shape, noise, dtype=torch.int32)
    codes, scale = quantize_squares(v, filled)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        decoded = dequantize_squares(codes, scale, dtype)
        assert decoded.dtype == dtype
        assert torch.equal(decoded > 0, v > 0)
        assert decoded.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(cols=st.integers(1, 600), seed=st.integers(0, 2**31), noise=st.integers(0, LEVELS - 1))
def test_squares_are_rounded_to_a_neighbour(cols: int, seed: int, noise: int) -> None:
    v = sample((2, cols), seed, False, 12)
    codes, scale = quantize_squares(v, torch.full(v.shape, noise, dtype=torch.int32))
    spread, table = by_blocks(v, scale), square_map(CPU)
    decoded = dequantize_squares(codes, scale)
    gap = gaps(table, v / spread) * spread
    least = table[FLOOR] * spread
    assert ((decoded - v).abs() <= gap * 1.001 + least + 1e-6 * v).all()
    nearest = dequantize_squares(*quantize_squares(v))
    assert ((nearest - v).abs() <= gap * 0.501 + least + 1e-6 * v).all()
    peak = v.amax(dim=-1) if cols <= BLOCK else None
    assert peak is None or torch.equal(decoded.amax(dim=-1), peak)


def test_stochastic_rounding_is_unbiased() -> None:
    draws = 4000
    x = sample((1, BLOCK), 4, False, 5).expand(draws, BLOCK).contiguous()
    noise = draw((draws, BLOCK), 5)
    table = square_map(CPU)
    decoded = dequantize_squares(*quantize_squares(x, noise))
    peak = x[0].abs().max()
    inside = x[0] / peak > table[FLOOR]
    error = (decoded.double() - x.double()).mean(dim=0)[inside]
    at = torch.bucketize(x[0] / peak, table, right=True).clamp(1, 255)
    gap = ((table[at] - table[at - 1]) * peak)[inside].double()
    part = ((x[0] / peak - table[at - 1]) / (table[at] - table[at - 1]))[inside].double()
    deviation = gap * (part * (1 - part)).clamp_min(0).sqrt() / math.sqrt(draws)
    allowed = 5 * deviation + gap * (10 / draws + 1 / LEVELS) * (part > 0) + 1e-6 * peak * part
    assert (error.abs() <= allowed).all()
    z = error / (deviation + gap / draws)
    assert z.mean().abs() < 5 / math.sqrt(len(z))
    assert 0.5 < z.square().mean() < 1.5


def test_noise_32767_is_nearest() -> None:
    v = sample((4, 700), 6, False)
    half = torch.full(v.shape, 32767, dtype=torch.int32)
    for mine, other in zip(quantize_squares(v), quantize_squares(v, half), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(2, 256), (3, 7), (1,), (0, 5), (4, 0)])
def test_zero_and_empty_blocks(shape: tuple[int, ...]) -> None:
    x, noise = torch.zeros(shape), draw(shape, 7)
    for signed in (True, False):
        codes, scale = quantize_blockwise(x, signed)
        assert codes.shape == x.shape
        assert scale.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
        assert not scale.any()
        assert not dequantize_blockwise(codes, scale, signed).any()
    assert not dequantize_squares(*quantize_squares(x, noise)).any()


@pytest.mark.parametrize("shape", [(256,), (2, 3, 300), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_leading_axes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v = sample(shape, 8, False).to(dtype)
    noise = draw(shape, 9)
    codes, scale = quantize_squares(v, noise)
    assert (codes.dtype, codes.shape, scale.dtype) == (torch.uint8, v.shape, torch.float32)
    flat, flat_scale = quantize_squares(
        v.float().reshape(-1, shape[-1]), noise.reshape(-1, shape[-1])
    )
    assert torch.equal(codes.reshape(flat.shape), flat)
    assert torch.equal(scale.reshape(flat_scale.shape), flat_scale)
    for decoded in (
        dequantize_squares(codes, scale, dtype),
        dequantize_blockwise(*quantize_blockwise(v, True), True, dtype),
    ):
        assert (decoded.dtype, decoded.shape) == (dtype, v.shape)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_spoils_its_block_only(bad: float) -> None:
    x = sample((2, 512), 10)
    x[0, 5] = bad
    v = x.abs()
    for decoded in (
        dequantize_blockwise(*quantize_blockwise(x, True), True),
        dequantize_squares(*quantize_squares(v, draw((2, 512), 11))),
    ):
        assert not decoded[0, :256].isfinite().any()
        assert decoded[0, 256:].isfinite().all()
        assert decoded[1].isfinite().all()
