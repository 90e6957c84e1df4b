"""What is fed to the projector and carried to the next step, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import helpers.references as ref
import helpers.references_fed as fed
from helpers.compare import (
    COMMON,
    GAP,
    LENGTHS,
    OF_SHAPES,
    OF_SIDES,
    RANK,
    WHOLE,
    compare,
    normal,
    orthonormal,
)
from lowrank_optim import (
    ApolloAdamW,
    AutoRank,
    CondaW,
    DCTAdamW,
    ErrorFeedback,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LDAdamW,
    LowRank,
    MuonW,
    TrionW,
    WholeMomentum,
)
from lowrank_optim.functional.stored import load
from lowrank_optim.parts.storage import stored

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
@OF_SIDES
@pytest.mark.parametrize("length", LENGTHS)
def test_trion(shape, side, length):
    parts = {**WHOLE, "side": side, "length": length, "scale": 0.5}
    compare(
        shape,
        lambda p: TrionW(p, rank=RANK, momentum_dtype=None, **parts),
        lambda _: fed.Trion(RANK, **parts),
    )


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
        lambda bases: fed.ErrorFeedback(reference(bases, **parts), keep),
        parts["update_proj_gap"],
    )


@OF_SHAPES
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.908])
def test_ldadam(shape, rho):
    """And each subspace comes from one power step on what it is to be learnt from."""
    seen: dict[str, list[np.ndarray]] = {}
    parts = {**COMMON, "scale": 0.5, "rho": rho}

    def reference_of(bases):
        method = fed.LDAdam(RANK, bases, **parts)
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
        lambda _: fed.Conda(cols if rank == 1.0 else rank, **parts),
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


@pytest.mark.parametrize("shape", [(150, 131), (67, 201), (13, 7), (33, 33)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.01), ("8bit", 0.03), ("4bit", 0.35)])
def test_error_feedback_as_it_is_stored(shape, dtype, bound):
    """What is carried equals float32's, place by place, except for the rounding of each step."""
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
