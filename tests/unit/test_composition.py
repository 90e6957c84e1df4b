"""Everything composes, or is refused at construction with the reason."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from helpers.cases import GAP, Model, train
from lowrank_optim import SGDM, Columns, Drop, LowRank, Update

PROJECTORS = ["svd", "power", "dct", "random", "columns", "blocks"]
RESIDUALS = ["drop", "norm_scaled", "state_free", "grad_scaled", "compensated"]
RULES = ["adam", "lion", "sgdm", "muon", "orthogonal"]
FEEDS = ["error_feedback", "general_error_feedback", "whole_momentum"]
ON_REFRESH = ["keep", "reset", "rotate", "align"]
REFUSED_ON_REFRESH = {
    "dct": {"align"},
    "random": {"align"},
    "columns": {"align"},
    "blocks": {"keep", "rotate", "align"},
}


@pytest.mark.parametrize(
    ("projector", "residual", "rule", "on_refresh"),
    list(itertools.product(PROJECTORS, RESIDUALS, RULES, ON_REFRESH)),
)
def test_every_combination_runs_or_says_why_not(projector, residual, rule, on_refresh):
    model = Model()
    settings = {
        "lr": 1e-3,
        "rank": 0.4,
        "update_proj_gap": GAP,
        "projector": projector,
        "residual": residual,
        "rule": rule,
        "on_refresh": on_refresh,
    }
    if on_refresh in REFUSED_ON_REFRESH.get(projector, ()):
        with pytest.raises(ValueError, match=f"on_refresh='{on_refresh}' does not go with"):
            LowRank(model.parameters(), **settings)
        return
    if projector == "blocks" and residual in ("norm_scaled", "grad_scaled", "compensated"):
        with pytest.raises(ValueError, match="does not go with the projector Blocks"):
            LowRank(model.parameters(), **settings)
        return
    assert_runs(model, settings)


def assert_runs(model, settings):
    optimizer = LowRank(model.parameters(), **settings)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, optimizer, range(3 * GAP + 1))
    for name, param in model.named_parameters():
        assert param.isfinite().all()
        assert torch.equal(param, start[name]) == (param.numel() == 0), name


@pytest.mark.parametrize(
    ("feed", "projector", "rule", "residual", "rank"),
    list(
        itertools.product(
            FEEDS,
            ["svd", "power", "dct", "random", "columns"],
            ["adam", "lion", "muon", "orthogonal"],
            RESIDUALS,
            [0.4, "auto"],
        )
    ),
)
def test_every_feed_goes_with_the_rest_or_says_why_not(feed, projector, rule, residual, rank):
    model = Model()
    settings = {
        "lr": 1e-3,
        "rank": rank,
        "update_proj_gap": GAP,
        "feed": feed,
        "projector": projector,
        "residual": residual,
        "rule": rule,
        "on_refresh": "keep",
    }
    if feed != "error_feedback" and rule == "orthogonal":
        with pytest.raises(ValueError, match="the rule Orthogonal, which has no 'exp_avg'"):
            LowRank(model.parameters(), **settings)
    elif rank == "auto" and projector in ("random", "columns"):
        with pytest.raises(ValueError, match="which learns nothing of the gradient"):
            LowRank(model.parameters(), **settings)
    else:
        assert_runs(model, settings)


def test_blocks_take_a_share_not_a_rank():
    with pytest.raises(ValueError, match=r"rank=3.*share of matrices"):
        LowRank(Model().parameters(), projector="blocks", on_refresh="reset", rank=3)


def test_a_projector_rule_and_residual_of_the_user():
    """The protocols are enough: a projector that keeps the first columns, a rule, a residual."""

    @dataclass(frozen=True)
    class First(Columns):
        on_refresh: ClassVar[tuple[str, ...]] = ("keep",)

        def refresh(self, matrices):
            for _, state, site in matrices:
                state["index"].copy_(torch.arange(site.rank))

    @dataclass(frozen=True)
    class Sign(SGDM):
        def direction(self, grad, moments, count, group):
            return super().direction(grad, moments, count, group).sign_()

    @dataclass(frozen=True)
    class Double(Drop):
        def update(self, norms, state, site, group):
            return Update(direction=2.0)

    param = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = LowRank(
        [param], lr=0.5, rank=2, weight_decay=0.0, projector=First(), rule=Sign(), residual=Double()
    )
    param.grad = torch.ones(6, 5)
    optimizer.step()
    expected = torch.zeros(6, 5)
    expected[:, :2] = -1.0
    assert torch.equal(param.detach(), expected)
    assert "First" in optimizer.state_dict()["param_groups"][0]["projector"]


def test_a_residual_without_a_limiter_is_refused_before_a_step():
    """As a residual of earlier versions, whose `update` was given the sums."""

    class Earlier:
        def sums(self, norms, state, site, group):
            return norms.grad.sum((-2, -1), keepdim=False)

        def update(self, norms, sums, state, group, uncorrected):
            return Update(direction=1.0)

    with pytest.raises(ValueError, match=r"residual=.*Earlier.* a method `limited`"):
        LowRank([torch.nn.Parameter(torch.ones(8, 6))], rank=2, residual=Earlier())


def test_parts_must_be_hashable():
    class Unhashable:
        __hash__ = None

        def refresh(self):
            """Stand for a projector."""

    with pytest.raises(ValueError, match="hashable, as a frozen dataclass is"):
        LowRank([torch.nn.Parameter(torch.zeros(6, 5))], rank=2, projector=Unhashable())


@pytest.mark.parametrize("projector", ["svd", "power", "dct", "columns"])
def test_a_learnt_subspace_has_no_more_directions_than_the_matrix_has_rows(projector):
    """What is beyond would be rounding noise, which Adam makes as long as any step."""
    param = torch.nn.Parameter(torch.zeros(4, 30))
    optimizer = LowRank([param], rank=10, side="right", projector=projector, lr=0.1)
    for step in range(3):
        param.grad = torch.randn(4, 30, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    width = 4 if projector in ("svd", "power") else 10
    assert optimizer.state[param]["exp_avg"].shape == (4, width)
