"""The kernels of the 8-bit format and of random bits against their references, byte by byte."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels import draw
from lowrank_optim import functional, kernels

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("kind", [0, 2, 6])
@pytest.mark.parametrize(("rows", "cols"), [((0, 5), 21), ((3, 20), 256), ((7, 9), 700)])
@pytest.mark.parametrize("counted", [False, True])
def test_random_bits(rows, cols, kind, counted, device):
    where = draw((1,), torch.float32, device, 0).device
    step = torch.tensor(70000.0, device=where) if counted else 70000
    noise = functional.Noise(2**40 + 7, step, functional.stream_of(3, 2**31 + 11))
    arguments = (noise, kind, slice(*rows), cols, where)
    bits = kernels.random_bits(*arguments)
    assert bits.dtype == torch.int32
    assert torch.equal(bits, functional.random_bits(*arguments))
    assert kernels.random_bits(noise, kind, slice(2, 2), cols, where).shape == (0, cols)


@pytest.mark.parametrize("shape", [(40, 256), (3, 300), (2, 5), (1, 1), (2, 3, 70)])
def test_quantize_blockwise(shape, device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng) * 10 ** (-8 * torch.rand(shape, generator=rng))
    x = x.to(device)
    codes, scale = kernels.quantize_blockwise(x)
    wanted, wanted_scale = functional.quantize_blockwise(x)
    assert torch.equal(codes, wanted)
    assert torch.equal(scale, wanted_scale)
    decoded = kernels.dequantize_blockwise(codes, scale)
    assert torch.equal(decoded, functional.dequantize_blockwise(codes, scale))


@pytest.mark.parametrize("shape", [(40, 256), (3, 300), (2, 5), (1, 1), (2, 3, 70)])
def test_quantize_squares(shape, device):
    rng = torch.Generator().manual_seed(0)
    v = (torch.randn(shape, generator=rng) * 10 ** (-8 * torch.rand(shape, generator=rng))).square()
    bits = torch.randint(0, 1 << 16, shape, generator=rng, dtype=torch.int32).to(device)
    v = v.to(device)
    codes, scale = kernels.quantize_squares(v, bits)
    wanted, wanted_scale = functional.quantize_squares(v, bits)
    assert torch.equal(codes, wanted)
    assert torch.equal(scale, wanted_scale)
    decoded = kernels.dequantize_squares(codes, scale)
    assert torch.equal(decoded, functional.dequantize_squares(codes, scale))


@pytest.mark.parametrize("shape", [(5, 7), (9, 300), (2, 3, 40), (3, 257)])
@pytest.mark.parametrize("square", [False, True], ids=["signed", "squares"])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("several", [1, 3])
def test_move_columns(shape, square, common, several, device):
    """In place, with columns that come from the left and from the right, from other blocks."""
    *batch, _, rank = shape
    rng = torch.Generator().manual_seed(1)
    count = several * (1 if common else torch.Size(batch).numel())
    picked = [
        torch.randperm(2 * rank, generator=rng)[:rank].sort().values for _ in range(2 * count)
    ]
    old, new = (torch.stack(some) for some in (picked[:count], picked[count:]))
    places = functional.places_of(old, new).view(several, *([] if common else batch), rank)
    places = places.to(device)
    assert (places < 0).any()
    assert (places >= 0).any()
    form = functional.quantize_squares if square else functional.quantize_blockwise
    mine, wanted, noises = [], [], []
    for i in range(several):
        x = draw(shape, torch.float32, device, i) * draw(shape, torch.float32, device, 9).abs() ** 5
        for moments in (mine, wanted):
            moments.append(form(x.square() if square else x))
        step = torch.tensor(9.0 + i, device=x.device) if common else 9
        noises.append(functional.Noise(2**40 + 7, step, functional.stream_of(3 + i, 5), 11))
    kernels.move_columns(mine, places, square, noises, 4)
    functional.move_columns(wanted, places, square, noises, 4)
    for (codes, scale), (wanted_codes, wanted_scale) in zip(mine, wanted, strict=True):
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(scale, wanted_scale)


def test_every_code_and_its_neighbourhood(device):
    """All values of the maps, all middles, and the floats beside them."""
    table = functional.dynamic_map(True, torch.device("cpu"))
    points = torch.cat([table, (table[:-1] + table[1:]) * 0.5])
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    points = torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])
    rows = torch.nn.functional.pad(points.clamp(-1, 1), (0, -len(points) % 255)).view(-1, 255)
    x = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).to(device)
    assert torch.equal(kernels.quantize_blockwise(x)[0], functional.quantize_blockwise(x)[0])
    bits = torch.full(x.shape, 1234, dtype=torch.int32, device=device)
    for v in (x.square(), x.abs()):
        left, right = kernels.quantize_squares(v, bits), functional.quantize_squares(v, bits)
        assert torch.equal(left[0], right[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_block_as_in_the_reference(bad, device):
    x = draw((2, 512), torch.float32, device, 0)
    x[0, 5] = bad
    bits = torch.zeros(x.shape, dtype=torch.int32, device=device)
    for decoded in (
        kernels.dequantize_blockwise(*kernels.quantize_blockwise(x)),
        kernels.dequantize_squares(*kernels.quantize_squares(x.abs(), bits)),
    ):
        assert not decoded[0, :256].isfinite().any()
        assert decoded[0, 256:].isfinite().all()
        assert decoded[1].isfinite().all()


def test_infinite_squares_are_coded_as_in_the_reference(device):
    """Zeros beside one decode to infinity too, not to the nan of 0 times the scale."""
    v = draw((2, 300), torch.float32, device, 0).square()
    v[0, ::3] = 0
    v[0, 5] = float("inf")
    bits = torch.full(v.shape, 1234, dtype=torch.int32, device=device)
    codes, scale = kernels.quantize_squares(v, bits)
    assert torch.equal(codes, functional.quantize_squares(v, bits)[0])
    assert kernels.dequantize_squares(codes, scale)[0, :256].isinf().all()
