"""Every method against a slow reference written from the formulas, in float64, over refreshes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import helpers.references as ref
from helpers.cases import Model, assert_same, train, weights
from helpers.compare import COMMON, GAP, RANK, SHAPES, compare
from lowrank_optim import (
    DCT,
    SGDM,
    ApolloAdamW,
    Blocks,
    CompensatedAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GradScaled,
    Lion,
    LowRank,
    LowRankAdamW,
    NormScaled,
)
from lowrank_optim.parts.limiter import limit


def columns_of(bases):
    """Return the index of each refresh, read off the handed-over unit vectors."""
    return lambda k: np.flatnonzero(bases[k].any(axis=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate", "align"])
@pytest.mark.parametrize("side", ["auto", "left", "right"])
def test_galore(shape, on_refresh, side):
    settings = {**COMMON, "update_proj_gap": GAP, "scale": 0.25}
    compare(
        shape,
        lambda p: GaLoreAdamW(p, rank=RANK, on_refresh=on_refresh, side=side, **settings),
        lambda _: ref.GaLore(RANK, on_refresh=on_refresh, side=side, **settings),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projector", ["power", "random"])
@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate"])
def test_any_basis(shape, projector, on_refresh):
    settings = {**COMMON, "update_proj_gap": GAP, "scale": 0.5}
    compare(
        shape,
        lambda p: GaLoreAdamW(p, rank=RANK, projector=projector, on_refresh=on_refresh, **settings),
        lambda bases: ref.GaLore(
            RANK, subspace=ref.Given(bases), on_refresh=on_refresh, **settings
        ),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_dct(shape, gap, norm):
    settings = {**COMMON, "update_proj_gap": gap}
    compare(
        shape,
        lambda p: DCTAdamW(p, rank=RANK, projector=DCT(norm), **settings),
        lambda _: ref.DCTAdamW(RANK, norm=norm, **settings),
        gap,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("limiter", [1.01, 1.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_fira(shape, form, limiter, maximize):
    settings = {**COMMON, "update_proj_gap": GAP, "scale": 0.25, "maximize": maximize}
    residual = NormScaled(limiter, form)
    compare(
        shape,
        lambda p: (
            FiraAdamW(p, rank=RANK, limiter=limiter, **settings)
            if form == "code"
            else LowRank(p, rank=RANK, residual=residual, **settings)
        ),
        lambda _: ref.Fira(RANK, form=form, limiter=limiter, **settings),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state_free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("projector", ["columns", "svd", "random"])
def test_frugal(shape, state_free, projector):
    settings = {**COMMON, "update_proj_gap": GAP, "state_free": state_free, "state_free_scale": 0.3}
    subspaces = {
        "columns": lambda bases: ref.Columns(columns_of(bases)),
        "svd": lambda bases: ref.SVD(),
        "random": lambda bases: ref.Given(bases),
    }
    compare(
        shape,
        lambda p: FrugalAdamW(p, rank=RANK, projector=projector, **settings),
        lambda bases: ref.Frugal(RANK, subspace=subspaces[projector](bases), **settings),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rank", "per"), [(RANK, "row"), (1, "tensor")])
def test_apollo(shape, rank, per):
    settings = {**COMMON, "update_proj_gap": GAP, "scale": 2.0}
    compare(
        shape,
        lambda p: ApolloAdamW(p, rank=rank, **settings),
        lambda bases: ref.Apollo(rank, per=per, subspace=ref.Given(bases), **settings),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("compensation", "limiter"), [(0.4, 1.01), (1.5, 1.2)])
@pytest.mark.parametrize("on_refresh", ["keep", "rotate"])
def test_compensated(shape, compensation, limiter, on_refresh):
    parts = {"compensation": compensation, "limiter": limiter, "on_refresh": on_refresh}
    parts = {**COMMON, "update_proj_gap": GAP, "scale": 0.3, **parts}
    compare(
        shape,
        lambda p: CompensatedAdamW(p, rank=RANK, projector="svd", **parts),
        lambda _: ref.Compensated(RANK, **parts),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rule", "name"), [(Lion(), "lion"), (SGDM(), "sgdm")])
@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "reset"])
def test_other_rules(shape, rule, name, on_refresh):
    settings = {**COMMON, "update_proj_gap": GAP, "on_refresh": on_refresh, "lr": 1e-3}
    compare(
        shape,
        lambda p: LowRank(p, rank=RANK, rule=rule, **settings),
        lambda _: ref.GaLore(RANK, rule=name, **settings),
    )


def test_limiter_bounds_growth_and_forgets_useless_norms():
    """First norm free, later ones at most 1.01 times the last; 0, inf and nan leave no trace.

    A norm that overflows makes a step of 0.
    """
    state = {"residual_norm": torch.tensor([math.inf, math.inf])}
    steps = [
        ([3.0, 2.0], [1.0, 1.0], [3.0, 2.0]),
        ([6.0, 1.0], [0.505, 1.0], [3.03, 1.0]),
        ([0.0, math.nan], [1.0, 1.0], [3.03, 1.0]),
        ([math.inf, 2.0], [0.0, 0.505], [3.03, 1.01]),
    ]
    for norm, factor, kept in steps:
        found = limit(torch.tensor(norm), state, 1.01).flatten()
        torch.testing.assert_close(found, torch.tensor(factor))
        torch.testing.assert_close(state["residual_norm"], torch.tensor(kept))


@pytest.mark.parametrize("residual", [NormScaled(None), GradScaled(None)])
def test_no_limiter_keeps_no_norm(residual):
    param = torch.nn.Parameter(torch.zeros(8, 5))
    optimizer = LowRank([param], rank=2, residual=residual)
    param.grad = torch.randn(8, 5)
    optimizer.step()
    assert "residual_norm" not in optimizer.state[param]


@pytest.mark.parametrize("order", ["ascending", "descending", "mirror", "random"])
def test_blocks_take_turns(order):
    """Active matrices follow AdamW, the others the sign; every matrix has its turn each round."""
    shapes, gap, share = [(4, 3), (3, 5), (6, 2), (5, 5), (2, 2)], 3, 0.4
    size, chunks = 2, 3
    params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    optimizer = FrugalAdamW(
        params, lr=0.1, rank=share, projector=Blocks(order), update_proj_gap=gap, weight_decay=0.0
    )
    seen = []
    for step in range(2 * chunks * gap):
        before = [p.detach().clone() for p in params]
        for place, p in enumerate(params):
            p.grad = torch.full_like(p, float(place + 1) * (-1) ** place)
        optimizer.step()
        active = [optimizer.state[p]["exp_avg"].numel() > 0 for p in params]
        for p, old, on in zip(params, before, active, strict=True):
            assert torch.allclose(old - p.detach(), 0.1 * p.grad.sign(), atol=1e-6)
            shape = p.shape if p.shape[0] >= p.shape[1] else p.shape[::-1]
            assert optimizer.state[p]["exp_avg_sq"].shape == (shape if on else (shape[0], 0))
        if step % gap == 0:
            seen.append(tuple(place for place, on in enumerate(active) if on))
    expected = {
        "ascending": [(0, 1), (2, 3), (4,)] * 2,
        "descending": [(3, 4), (1, 2), (0,)] * 2,
        "mirror": [(0, 1), (2, 3), (4,), (3, 4), (1, 2), (0,)],
    }
    for lap in (seen[:chunks], seen[chunks:]):
        assert sorted(place for turn in lap for place in turn) == [0, 1, 2, 3, 4]
        assert max(map(len, lap)) == size
    assert order == "random" or seen == expected[order]


def test_active_block_gets_adamw():
    """A block that is active in every turn it is looked at equals AdamW, restarted at its turn."""
    params = [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    twin = torch.nn.Parameter(params[0].detach().clone())
    blocks = Blocks("ascending")
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = FrugalAdamW(params, rank=0.5, projector=blocks, update_proj_gap=10, **settings)
    adamw = torch.optim.AdamW([twin], **settings)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn_like(p)
        twin.grad = params[0].grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(params[0], twin, rtol=0, atol=1e-12)


def test_lowrank_is_frugal_in_a_power_subspace_with_half_the_sign_step():
    """Our own method is no more than the settings that its docstring names."""
    ours, same = Model(), Model()
    settings = {"lr": 1e-2, "rank": RANK, "weight_decay": 0.1, "update_proj_gap": GAP}
    settings["length"] = "published"
    train(ours, LowRankAdamW(ours.parameters(), **settings), range(2 * GAP + 1))
    parts = {"projector": "power", "on_refresh": "keep", "state_free_scale": 0.5}
    train(same, FrugalAdamW(same.parameters(), **settings, **parts), range(2 * GAP + 1))
    assert_same(weights(ours), weights(same))
