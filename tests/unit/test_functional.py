"""Properties of the functions beneath: bases, moments, random bits, rounding."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim.functional import (
    Noise,
    bases,
    bits_of,
    canonical_signs,
    dct_basis,
    generator,
    gram,
    orthonormal_,
    philox,
    places_of,
    random_bits,
    select_moment,
    stochastic_round,
    stream_of,
)

CPU = torch.device("cpu")


def gradient(shape, dtype, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (3, 60, 20), (700, 128)])
@pytest.mark.parametrize("kind", ["random", "graded", "dependent", "scaled"])
def test_cholesky_qr_is_orthonormal_and_keeps_the_span(dtype, shape, kind, monkeypatch):
    monkeypatch.setattr(bases, "PARTS", 1 << 12)
    x = gradient(shape, torch.float64)
    if kind == "graded":
        x = torch.linalg.qr(x).Q * torch.logspace(0, -5, shape[-1], dtype=torch.float64)
        x = x @ torch.linalg.qr(gradient((shape[-1],) * 2, torch.float64)).Q
    elif kind == "dependent":
        x = x[..., :1] + 1e-6 * x
    elif kind == "scaled":
        x = x * torch.logspace(-30, 30, shape[-1], dtype=torch.float64)
    x = x.to(dtype)
    triangular = torch.linalg.qr(x.double())
    span = triangular.Q * triangular.R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    orthonormal_(x)
    eye = torch.eye(shape[-1], dtype=torch.float64).expand(*shape[:-2], -1, -1)
    exact = dtype == torch.float64
    torch.testing.assert_close(gram(x), eye, rtol=0, atol=1e-10 if exact else 2e-6)
    torch.testing.assert_close(x.double(), span, rtol=0, atol=1e-4)


def test_gram_does_not_depend_on_its_pieces(monkeypatch):
    x = gradient((2, 50, 7), torch.float32)
    whole = gram(x)
    torch.testing.assert_close(whole, x.double().mT @ x.double(), rtol=0, atol=1e-12)
    monkeypatch.setattr(bases, "PARTS", 1 << 16)
    torch.testing.assert_close(gram(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 129])
def test_dct_equals_scipy(n):
    x = gradient((5, n), torch.float64)
    ours = (x @ dct_basis(n, torch.float64, CPU)).numpy()
    np.testing.assert_allclose(ours, scipy.fft.dct(x.numpy(), type=2, norm="ortho"), atol=1e-12)


def test_generator_separates_numbers():
    draws = [
        float(torch.rand((), generator=generator(CPU, *key)))
        for key in [(0,), (1,), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]
    ]
    assert len(set(draws)) == len(draws)


@given(st.integers(3, 12), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_selecting_moments_is_the_product_with_the_selection(n, seed):
    rng = torch.Generator().manual_seed(seed)
    rank = n - 1
    old, new = (torch.randperm(n, generator=rng)[:rank].sort().values for _ in range(2))
    eye = torch.eye(n)
    moment = torch.rand(2, 5, rank, generator=rng)
    expected = moment @ (eye[:, old].mT @ eye[:, new])
    select_moment(moment, places_of(old, new).expand(2, -1))
    assert torch.equal(moment, expected)


def test_canonical_signs():
    basis = gradient((3, 6, 4), torch.float64)
    signed = canonical_signs(basis)
    assert torch.equal(signed.abs(), basis.abs())
    assert torch.equal(canonical_signs(-basis), signed)
    peaks = signed.gather(-2, signed.abs().argmax(-2, keepdim=True))
    assert (peaks > 0).all()


def bits_for(x, seed):
    return bits_of(Noise(seed, 1, 0), 0, x)


def test_stochastic_rounding_is_unbiased_and_between_neighbours():
    x = gradient((200,), torch.float32).repeat(4000, 1)
    rounded = stochastic_round(x, bits_for(x, 0)).float()
    spacing = 2.0 ** (x[0].abs().log2().floor() - 7)
    assert ((rounded - x).abs() < spacing).all()
    error = (rounded.double().mean(0) - x[0].double()) / spacing
    assert float(error.abs().max()) < 5 * 0.5 / 4000**0.5
    exact = x[:1].bfloat16().float()
    assert torch.equal(stochastic_round(exact, bits_for(exact, 1)).float(), exact)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    kept = stochastic_round(special, bits_for(special, 2)).float()
    assert torch.equal(kept.nan_to_num(nan=7), special.nan_to_num(nan=7))


def test_philox_gives_the_published_words():
    """The known answers of Random123 for philox4x32-10."""
    ones = torch.full((1,), 0xFFFFFFFF, dtype=torch.int64)
    for seed, word, wanted in (
        (0, ones * 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        assert tuple(int(part) for part in philox(seed, (word,) * 4)) == wanted


def test_random_bits_are_a_function_of_place_and_never_shared():
    """Rows in any pieces give the same bits; another seed, step, parameter, use or row others."""
    noise = Noise(5, 3, stream_of(2))
    whole = random_bits(noise, 0, slice(0, 9), 21, CPU)
    parts = [random_bits(noise, 0, slice(a, b), 21, CPU) for a, b in ((0, 4), (4, 9))]
    assert torch.equal(torch.cat(parts), whole)
    shifted = noise._replace(stream=stream_of(2, 4))
    assert torch.equal(random_bits(shifted, 0, slice(0, 5), 21, CPU), whole[4:])
    others = [
        random_bits(Noise(6, 3, stream_of(2)), 0, slice(0, 9), 21, CPU),
        random_bits(Noise(5, 4, stream_of(2)), 0, slice(0, 9), 21, CPU),
        random_bits(Noise(5, 3, stream_of(3)), 0, slice(0, 9), 21, CPU),
        random_bits(noise, 1, slice(0, 9), 21, CPU),
    ]
    for other in others:
        assert (other == whole).float().mean() < 0.05
    many = random_bits(noise, 0, slice(0, 3000), 100, CPU).double() / 65535
    assert abs(float(many.mean()) - 0.5) < 5 * 12**-0.5 / 3e5**0.5
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 1 << 16
