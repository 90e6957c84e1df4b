"""Whole matrices, feeds and Alice's residual against slow references; Newton-Schulz; 4 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import helpers.references as ref
import helpers.references_more as more
from helpers.compare import COMMON, GAP, RANK, SHAPES, compare
from lowrank_optim import (
    RACS,
    ApolloAdamW,
    AutoRank,
    CompensatedAdamW,
    CondaW,
    DCTAdamW,
    ErrorFeedback,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LDAdamW,
    LowRank,
    MuonW,
    NorMuonW,
    TrionW,
    WholeMomentum,
)
from lowrank_optim.functional import BLOCK_4BIT, dequantize_4bit, newton_schulz, quantize_4bit
from lowrank_optim.functional.stored import load
from lowrank_optim.parts.storage import stored

LENGTHS = ["original", "match_rms_adamw", "dion", "none"]
OF_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)
OF_SIDES = pytest.mark.parametrize("side", ["auto", "left", "right"])
WHOLE = {**COMMON, "momentum": 0.9}
"""Settings that methods for whole matrices share; betas and eps are those of other parameters."""


def normal(shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(rows: int, cols: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal((rows, cols), seed))[0]


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_muon(shape, side, nesterov, length):
    """The same on any side."""
    parts = {"nesterov": nesterov, "length": length}
    compare(
        shape,
        lambda p: MuonW(p, side=side, **WHOLE, **parts),
        lambda _: more.Muon(**WHOLE, **parts),
    )


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize("nesterov", [False, True])
def test_normuon(shape, side, nesterov):
    """A neuron is a row of the weight on any side."""
    compare(
        shape,
        lambda p: NorMuonW(p, side=side, nesterov=nesterov, **WHOLE),
        lambda _: more.NorMuon(nesterov=nesterov, **WHOLE),
    )


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize(("beta", "limiter"), [(0.9, 1.01), (0.5, 1.5)])
def test_racs(shape, side, beta, limiter):
    parts = {**COMMON, "side": side, "beta": beta, "limiter": limiter, "scale": 0.5}
    compare(shape, lambda p: RACS(p, **parts), lambda _: more.RACS(**parts))


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize("length", LENGTHS)
def test_trion(shape, side, length):
    parts = {**WHOLE, "side": side, "length": length, "scale": 0.5}
    compare(
        shape,
        lambda p: TrionW(p, rank=RANK, momentum_dtype=None, **parts),
        lambda _: more.Trion(RANK, **parts),
    )


FED = {
    "galore": (GaLoreAdamW, lambda _, **s: ref.GaLore(RANK, **s), {}),
    "rotate": (GaLoreAdamW, lambda _, **s: ref.GaLore(RANK, **s), {"on_refresh": "rotate"}),
    "align": (GaLoreAdamW, lambda _, **s: ref.GaLore(RANK, **s), {"on_refresh": "align"}),
    "dct": (DCTAdamW, lambda _, **s: ref.DCTAdamW(RANK, **s), {"update_proj_gap": 1}),
    "fira": (FiraAdamW, lambda _, **s: ref.Fira(RANK, **s), {"limiter": 1.2}),
    "frugal": (
        lambda p, **s: FrugalAdamW(p, projector="svd", **s),
        lambda _, **s: ref.Frugal(RANK, **s),
        {"state_free_scale": 0.3},
    ),
    "apollo": (ApolloAdamW, lambda b, **s: ref.Apollo(RANK, subspace=ref.Given(b), **s), {}),
}


@OF_SHAPES
@pytest.mark.parametrize("keep", [0.0, 0.7])
@pytest.mark.parametrize("name", FED)
def test_error_feedback(shape, keep, name):
    """All that a method does with the gradient, it does with what is fed."""
    factory, reference, parts = FED[name]
    parts = {**COMMON, "update_proj_gap": GAP, "scale": 0.5, **parts}
    feed = ErrorFeedback(keep, dtype=None)
    compare(
        shape,
        lambda p: factory(p, rank=RANK, feed=feed, **parts),
        lambda bases: more.ErrorFeedback(reference(bases, **parts), keep),
        parts["update_proj_gap"],
    )


@OF_SHAPES
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.908])
def test_ldadam(shape, rho):
    """And each subspace is that of one power step on what it is to be learnt from."""
    seen: dict[str, list[np.ndarray]] = {}
    parts = {**COMMON, "scale": 0.5, "rho": rho}

    def reference_of(bases):
        method = more.LDAdam(RANK, bases, **parts)
        seen.update(bases=bases, lessons=method.lessons)
        return method

    compare(shape, lambda p: LDAdamW(p, rank=RANK, error_dtype=None, **parts), reference_of, gap=1)
    bases, lessons = seen["bases"], seen["lessons"]
    for B, old, new in zip(lessons[1:], bases, bases[1:], strict=False):
        wanted, _ = np.linalg.qr(B.T @ B @ old)
        np.testing.assert_allclose(new @ new.T, wanted @ wanted.T, rtol=0, atol=1e-5)


@OF_SHAPES
def test_first_subspace_of_ldadam_is_learnt_from_the_gradient(shape):
    """A gradient of the subspace's rank is found by the first power step, and leaves no error."""
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = LDAdamW([param], rank=RANK, error_dtype=None)
    param.grad = orthonormal(shape[0], RANK, 0) @ orthonormal(shape[1], RANK, 1).mT
    optimizer.step()
    assert optimizer.state[param]["error"].norm() < 1e-4 * param.grad.norm()


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize("rank", [1.0, RANK])
def test_conda(shape, side, rank):
    cols = {"auto": min(shape), "left": shape[0], "right": shape[1]}[side]
    parts = {**COMMON, "update_proj_gap": GAP, "scale": 0.25, "side": side}
    compare(
        shape,
        lambda p: CondaW(p, rank=rank, **parts),
        lambda _: more.Conda(cols if rank == 1.0 else rank, **parts),
    )


@OF_SHAPES
@pytest.mark.parametrize(("compensation", "limiter"), [(0.4, 1.01), (1.5, 1.2)])
@pytest.mark.parametrize("on_refresh", ["keep", "rotate"])
def test_compensated(shape, compensation, limiter, on_refresh):
    parts = {"compensation": compensation, "limiter": limiter, "on_refresh": on_refresh}
    parts = {**COMMON, "update_proj_gap": GAP, "scale": 0.3, **parts}
    compare(
        shape,
        lambda p: CompensatedAdamW(p, rank=RANK, projector="svd", **parts),
        lambda _: more.Compensated(RANK, **parts),
    )


def assert_twins(shape, first_of, second_of, tolerance, steps=10):
    """Two optimizers do the same to one weight in float64."""
    start = normal(shape, 99)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [of([p]) for of, p in zip((first_of, second_of), params, strict=True)]
    for step in range(steps):
        grad = normal(shape, step)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(*params, rtol=0, atol=tolerance)
    assert (params[0] - start).abs().max() > 1e-3


@OF_SHAPES
def test_trion_of_full_rank_is_muon(shape):
    assert_twins(
        shape,
        lambda p: TrionW(p, rank=1.0, **WHOLE),
        lambda p: MuonW(p, nesterov=False, **WHOLE),
        1e-8,
    )


@OF_SHAPES
def test_momentum_of_a_feed_is_that_of_muon(shape):
    """With `keep`, the feed's error is heavy-ball momentum."""
    feed = ErrorFeedback(keep=0.9, dtype=None)
    parts = {"rank": 1.0, "projector": "identity", "rule": "orthogonal", "feed": feed}
    assert_twins(
        shape,
        lambda p: LowRank(p, residual="drop", scale=1.0, **parts, **COMMON),
        lambda p: MuonW(p, nesterov=False, **WHOLE),
        1e-10,
    )


@OF_SHAPES
def test_whole_momentum_without_a_projection_is_adamw(shape):
    parts = {"rank": 1.0, "projector": "identity", "feed": WholeMomentum(), "residual": "drop"}
    assert_twins(
        shape,
        lambda p: LowRank(p, scale=1.0, **parts, **COMMON),
        lambda p: torch.optim.AdamW(p, **COMMON),
        1e-10,
    )


@OF_SHAPES
def test_nothing_is_carried_at_full_rank(shape):
    param = torch.nn.Parameter(normal(shape, 99))
    feed = ErrorFeedback(dtype=None)
    everything = AutoRank(1.0, 1.0, 1.0)
    optimizer = GaLoreAdamW([param], rank=everything, feed=feed, update_proj_gap=GAP)
    for step in range(2 * GAP + 1):
        param.grad = normal(shape, step)
        optimizer.step()
        assert optimizer.state[param]["error"].abs().max() < 1e-10


@pytest.mark.parametrize(("dtype", "slack"), [("float64", 0.0), ("bfloat16", 0.03)])
@pytest.mark.parametrize(("least", "most"), [(0.0025, 1.203), (0.005, 1.155), (0.01, 1.135)])
@pytest.mark.parametrize("shape", [(64, 64), (131, 40), (33, 97), (17, 1)], ids=str)
def test_newton_schulz_makes_singular_values_nearly_one(shape, least, most, dtype, slack):
    """Those of a share of the norm; the quintic brings shares near 0.0041 to 1.2024."""
    rows, cols = max(shape), min(shape)
    for size in (1e-3, 1.0, 1e3):
        for decades in (0, 1, 2, 4, 6):
            weights = torch.logspace(0, -decades, cols, dtype=torch.float64)
            weights *= (1 - cols * least**2) / weights.sum()
            values = (least**2 + weights).sqrt()
            x = size * orthonormal(rows, cols, 0) * values @ orthonormal(cols, cols, 1)
            x = x if shape[0] >= shape[1] else x.mT
            x = x if dtype == "float64" else x.float()
            y = newton_schulz(x, dtype=getattr(torch, dtype))
            assert y.dtype == x.dtype
            found = torch.linalg.svdvals(y.double())
            assert found.min() > 0.681 - slack
            assert found.max() < most + slack


@pytest.mark.parametrize("shape", [(13, 7), (5, 11), (9, 9), (1, 6)], ids=str)
@pytest.mark.parametrize("iterations", [1, 5])
def test_newton_schulz(shape, iterations):
    """Equals the reference, of a stack as of each, and of the transposed transposed; 0 gives 0."""
    x = normal((3, *shape), 0)
    x[1] *= 100
    x[2] = 0
    y = newton_schulz(x, iterations, torch.float64)
    for one, found in zip(x, y, strict=True):
        wanted = more.newton_schulz(one.numpy(), iterations)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-12)
        alone = newton_schulz(one, iterations, torch.float64)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-13)
        turned = newton_schulz(one.mT, iterations, torch.float64).mT
        torch.testing.assert_close(found, turned, rtol=0, atol=1e-12)
    assert not y[2].any()
    assert not newton_schulz(x[2].float(), iterations).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize("shape", [(48, 31), (31, 48), (40, 40)], ids=str)
@pytest.mark.parametrize("length", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_that_of_torch(shape, length, nesterov):
    """Up to the order of bfloat16 products: there, momentum is an average."""
    parts = {"lr": 2e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    start = normal(shape, 99, torch.float32)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = MuonW([ours], length=length, **parts)
    peer = torch.optim.Muon([theirs], adjust_lr_fn=length, **parts)
    for step in range(5):
        ours.grad = normal(shape, step, torch.float32)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
    error = (ours - theirs).norm() / (theirs - start).norm()
    assert error < 0.03


def noise_of(shape, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 65536, shape, dtype=torch.int32, generator=rng)


def by_place(scale: Tensor, cols: int) -> Tensor:
    return scale.repeat_interleave(BLOCK_4BIT, -1)[..., :cols]


ROWS = st.integers(1, 4)
WIDTHS = st.integers(1, 210)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None, max_examples=60)
@given(WIDTHS, SEEDS, st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]))
def test_4bit_keeps_places(cols, seed, size):
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
def test_4bit_errs_by_at_most_one_level(rows, cols, seed, exponent, dtype):
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
def test_4bit_is_right_on_the_average(cols, seed, exponent):
    """The mean over every noise there is equals x to the noise's last bit."""
    x = normal(cols, seed, torch.float32) * 10**exponent
    noise = torch.arange(65536, dtype=torch.int32).unsqueeze(-1).expand(-1, cols)
    packed, scale = quantize_4bit(x.expand(65536, -1), noise)
    mean = dequantize_4bit(packed, scale, torch.float64)[:, :cols].mean(0)
    assert ((mean - x).abs() <= by_place(scale[0], cols) / 7 * 2 / 65536).all()


@settings(deadline=None, max_examples=60)
@given(WIDTHS, SEEDS, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_4bit_keeps_what_is_not_finite_within_its_block(cols, seed, bad):
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


@pytest.mark.parametrize("shape", [(150, 131), (67, 201), (13, 7), (33, 33)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.01), ("8bit", 0.03), ("4bit", 0.35)])
def test_error_feedback_as_it_is_stored(shape, dtype, bound):
    """What is carried is that of float32 by position, but for the rounding of each step."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    optimizers = [
        GaLoreAdamW([p], rank=RANK, feed=ErrorFeedback(dtype=d), update_proj_gap=100)
        for p, d in zip(params, (None, dtype), strict=True)
    ]
    cols = min(shape)
    for step in range(4):
        grad = normal(shape, step, torch.float32)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        wanted, found = (
            load(stored(o.state[p], "error"), torch.float32, False)[..., :cols]
            for o, p in zip(optimizers, params, strict=True)
        )
        assert (found - wanted).norm() < bound * wanted.norm()
    for dim in (0, 1):
        error = (found - wanted).norm(dim=dim) / wanted.norm(dim=dim)
        assert error.max() < 2 * bound
