"""What is derived from groups is kept until they change, and frees its optimizer."""

import gc
import weakref

import pytest
import torch
from torch import nn

from helpers.cases import AUTO, CASES, Model, gradient
from lowrank_optim import FiraAdamW, GaLoreAdamW, LowRankAdamW, MuonW, SettingError


def stepped(**settings):
    params = [nn.Parameter(torch.ones(9, 7)), nn.Parameter(torch.ones(5))]
    optimizer = GaLoreAdamW(params, **{"rank": 3, **settings})
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def set_lr(group):
    group["lr"] = 0.5


def set_betas(group):
    group["betas"] = [0.5, 0.9]


def set_gap(group):
    group["update_proj_gap"] = 7


def freeze(group):
    group["params"][0].requires_grad_(False)


def widen(group):
    group["params"][1].data = group["params"][1].data.double()
    group["params"][1].grad = None


def replace(group):
    group["params"][1] = nn.Parameter(torch.ones(5))


def forget(group):
    del group["seed"]


@pytest.mark.parametrize("change", [set_lr, set_betas])
def test_numbers_change_nothing_that_is_derived(change):
    optimizer = stepped()
    before = optimizer._session.prepared()
    change(optimizer.param_groups[0])
    assert optimizer._session.prepared() is before
    optimizer.step()
    assert optimizer._session.prepared() is before


def test_numbers_are_checked_when_they_change():
    optimizer = stepped()
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr=nan in group 0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [
        (MuonW, "nesterov", 1),
        (LowRankAdamW, "state_free_scale", True),
        (GaLoreAdamW, "lr", True),
        (GaLoreAdamW, "weight_decay", False),
        (GaLoreAdamW, "maximize", 0),
        (GaLoreAdamW, "skipped_steps", False),
    ],
)
def test_a_bool_is_no_number_and_a_number_no_bool_though_they_are_equal(preset, key, value):
    """A checkpoint with one would be refused."""
    start = {} if preset is MuonW else {"rank": 3}
    start |= {key: 1.0} if value is True else {"weight_decay": 0.0}
    optimizer = preset([nn.Parameter(torch.ones(9, 7))], **start)
    param, group = optimizer.param_groups[0]["params"][0], optimizer.param_groups[0]
    param.grad = torch.ones_like(param)
    optimizer.step()
    before, weight = group[key], param.detach().clone()
    assert before == value
    group[key] = value
    with pytest.raises(SettingError, match=f"{key}={value} in group 0: {key} must be"):
        optimizer.step()
    assert torch.equal(param, weight)
    group[key] = before
    optimizer.step()


def test_an_int_of_the_same_value_becomes_a_float_and_changes_nothing_else():
    optimizer = stepped(lr=1.0)
    before = optimizer._session.prepared()
    optimizer.param_groups[0]["lr"] = 1
    assert optimizer._session.prepared() is before
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize("change", [set_gap, freeze, widen, replace, forget])
def test_what_decides_how_a_parameter_is_worked_on_is_derived_again(change):
    optimizer = stepped()
    before = optimizer._session.prepared()
    change(optimizer.param_groups[0])
    after = optimizer._session.prepared()
    assert after is not before
    assert optimizer._session.prepared() is after


def test_chosen_ranks_follow_the_states():
    optimizer = stepped(rank=AUTO, min_dim=1)
    assert optimizer._session.prepared() is not optimizer._session.prepared()


@pytest.mark.parametrize("layerwise", [False, True])
def test_an_optimizer_is_freed_without_the_garbage_collector(layerwise):
    optimizer = stepped()
    if layerwise:
        optimizer.step_in_backward()
        optimizer.step()
    seen = weakref.ref(optimizer), weakref.ref(optimizer.param_groups[0]["params"][0])
    gc.disable()
    try:
        del optimizer
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("galore", "frugal", "fira")], ids=str
)
def test_together_or_one_by_one_makes_no_difference(case, monkeypatch):
    """Small matrices go in lists; that must not show, whatever their counts."""
    ends = []
    for few in (1 << 18, 0):
        monkeypatch.setattr("lowrank_optim.engine.update.FEW", few)
        model = Model()
        optimizer = case.build(model.parameters())
        for step in range(5):
            for position, param in enumerate(model.parameters()):
                late = position == 1 and step < 2
                param.grad = None if late else gradient(param, step, position)
            optimizer.step()
        ends.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_one_overflow_among_small_matrices_is_that_of_one_alone(monkeypatch):
    ends = []
    for few in (1 << 18, 0):
        monkeypatch.setattr("lowrank_optim.engine.update.FEW", few)
        params = [nn.Parameter(torch.ones(9, 7)) for _ in range(3)]
        optimizer = FiraAdamW(params, rank=3, lr=1e-2)
        for step in range(3):
            for place, param in enumerate(params):
                param.grad = gradient(param, step, place) * (8e37 if place == step else 1.0)
            optimizer.step()
        ends.append(params)
    assert all(map(torch.equal, *ends))
    assert all(param.isfinite().all() for param in ends[0])
