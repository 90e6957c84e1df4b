"""Rules for whole matrices against slow references, and Newton-Schulz beneath them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import helpers.references_whole as ref
from helpers.compare import (
    COMMON,
    LENGTHS,
    OF_SHAPES,
    OF_SIDES,
    WHOLE,
    compare,
    normal,
    orthonormal,
)
from lowrank_optim import RACS, RMNPW, MuonW, NorMuonW
from lowrank_optim.functional import newton_schulz


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
        lambda _: ref.Muon(**WHOLE, **parts),
    )


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize("nesterov", [False, True])
def test_normuon(shape, side, nesterov):
    """A neuron is a row of the weight on any side."""
    compare(
        shape,
        lambda p: NorMuonW(p, side=side, nesterov=nesterov, length="published", **WHOLE),
        lambda _: ref.NorMuon(nesterov=nesterov, **WHOLE),
    )


@OF_SHAPES
@OF_SIDES
def test_rmnp(shape, side):
    """A neuron is a row of the weight on any side."""
    compare(shape, lambda p: RMNPW(p, side=side, **WHOLE), lambda _: ref.RMNP(**WHOLE))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rmnp_moves_each_neuron_that_has_a_gradient_by_lr_and_no_other(side):
    """Whatever its gradients, down to the smallest and up to the largest there are."""
    param = torch.nn.Parameter(torch.zeros(6, 5))
    param.grad = normal((6, 5), 0, torch.float32)
    least, most = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    param.grad *= torch.tensor([0, 100 * least, 1e-20, 1, 1e20, most / 4]).unsqueeze(1)
    RMNPW([param], lr=0.1, weight_decay=0.0, side=side).step()
    found = param.detach().double().norm(dim=1)
    torch.testing.assert_close(found, 0.1 * torch.tensor([0, 1, 1, 1, 1, 1]).double(), rtol=1e-3,
                               atol=0)  # fmt: skip


@OF_SHAPES
@OF_SIDES
@pytest.mark.parametrize(("beta", "limiter"), [(0.9, 1.01), (0.5, 1.5)])
def test_racs(shape, side, beta, limiter):
    parts = {**COMMON, "side": side, "beta": beta, "limiter": limiter, "scale": 0.5}
    compare(shape, lambda p: RACS(p, **parts), lambda _: ref.RACS(**parts))


@pytest.mark.parametrize(("dtype", "slack"), [("float64", 0.0), ("bfloat16", 0.03)])
@pytest.mark.parametrize(("least", "most"), [(0.0025, 1.203), (0.005, 1.155), (0.01, 1.135)])
@pytest.mark.parametrize("shape", [(64, 64), (131, 40), (33, 97), (17, 1)], ids=str)
def test_newton_schulz_makes_singular_values_nearly_one(shape, least, most, dtype, slack):
    """From a share of the norm on; the quintic brings shares near 0.0041 to 1.2024."""
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
        wanted = ref.newton_schulz(one.numpy(), iterations)
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
