"""A method beside its slow reference, over refreshes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_optim import LowRank
from lowrank_optim.engine.sites import sites_of
from lowrank_optim.parts.types import Shared
from lowrank_optim.settings.plans import plan_of

SHAPES = [(13, 7), (5, 11), (9, 9)]
RANK, GAP, STEPS = 3, 4, 15
"""Four refreshes, the last interval cut short."""

COMMON = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WHOLE = {**COMMON, "momentum": 0.9}
"""Settings that methods for whole matrices share; betas and eps are for the other parameters."""

LENGTHS = ["original", "match_rms_adamw", "dion", "none"]
"""Of the steps of Muon and its kin."""

OF_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)
OF_SIDES = pytest.mark.parametrize("side", ["auto", "left", "right"])


def normal(shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(rows: int, cols: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal((rows, cols), seed))[0]


def basis_of(optimizer: LowRank, param: Tensor) -> np.ndarray:
    """Return the basis that the optimizer used in its last step."""
    group = optimizer.param_groups[0]
    plan = plan_of(group)
    ((_, site),) = sites_of(group, plan, Shared())
    return plan.projector.basis(optimizer.state[param], site).numpy().copy()


def compare(shape, optimizer_of, reference_of, gap=GAP, tolerance=1e-10):
    """Run both side by side with a moving learning rate; bases that are drawn are handed over."""
    rng = np.random.default_rng(sum(shape))
    start = rng.standard_normal(shape)
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = optimizer_of([param])
    bases: list[np.ndarray] = []
    reference = reference_of(bases)
    expected = start
    for step in range(STEPS):
        grad = rng.standard_normal(shape) * rng.uniform(0.1, 3.0)
        lr = COMMON["lr"] * (1 + step) / STEPS
        optimizer.param_groups[0]["lr"] = reference.lr = lr
        param.grad = torch.from_numpy(grad)
        optimizer.step()
        if step % gap == 0:
            bases.append(basis_of(optimizer, param))
        expected = reference.step(expected, grad)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=0, atol=tolerance)
    assert np.abs(expected - start).max() > 1e-2
