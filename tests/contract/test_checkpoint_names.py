"""With names on both sides states go by name, without by place."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from helpers.cases import CASES, GAP, RANK, Model, assert_same, gradient, train, weights
from lowrank_optim import GaLoreAdamW
from lowrank_optim.parts.checks import SettingError

PLACES = {name: place for place, (name, _) in enumerate(Model().named_parameters())}


def step_by_name(model, optimizer, steps):
    """Steps whose gradients go by name, whatever the order of the parameters."""
    for number in steps:
        for name, param in model.named_parameters():
            param.grad = gradient(param, number, PLACES[name])
        optimizer.step()


def named(model, order=None):
    pairs = dict(model.named_parameters())
    return [(name, pairs[name]) for name in order or pairs]


def split(model, *parts, **settings):
    """Groups of the named parameters of each part; the last has the rest."""
    rest = [name for name in PLACES if not any(name in part for part in parts)]
    return [{"params": named(model, part)} for part in (*parts, rest)]


ORDERS = {
    "reversed": lambda model: named(model, list(PLACES)[::-1]),
    "two groups": lambda model: split(model, ["stack", "scalar", "wide"]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["galore-power", "dct", "apollo", "normuon", "galore-8bit"])
def test_states_go_to_the_parameters_of_their_names(name, order):
    """No random draw here goes by place, but that of 8-bit moments."""
    case = next(case for case in CASES if case.name == name)
    model = Model()
    optimizer = case.build(split(model, ["vector", "tall"]), stagger=False)
    step_by_name(model, optimizer, range(GAP + 1))
    saved = copy.deepcopy(optimizer.state_dict())
    other = Model(seed=5)
    other.load_state_dict(model.state_dict())
    groups = ORDERS[order](other)
    resumed = case.build(groups, stagger=False)
    if order == "reversed":
        with pytest.raises(SettingError, match="2 groups, this optimizer 1"):
            resumed.load_state_dict(saved)
        first = Model()
        optimizer = case.build(first.named_parameters(), stagger=False)
        step_by_name(first, optimizer, range(GAP + 1))
        other.load_state_dict(first.state_dict())
        model, saved = first, copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    resumed.load_state_dict(saved)
    assert str(saved) == str(before)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for name in PLACES:
        left, right = optimizer.state[ours[name]], resumed.state[theirs[name]]
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), (name, key)
    if case.name != "galore-8bit":
        for some in ((model, optimizer), (other, resumed)):
            step_by_name(*some, range(GAP + 1, 2 * GAP + 2))
        assert_same(weights(model), weights(other))


def test_groups_of_the_same_names_keep_their_settings_whatever_their_order():
    model = Model()
    first, second, third = split(model, ["tall", "wide"], ["square"])
    optimizer = GaLoreAdamW(
        [{**first, "lr": 0.1}, {**second, "lr": 0.2}, {**third, "lr": 0.3}], rank=RANK
    )
    saved = optimizer.state_dict()
    turned = GaLoreAdamW(
        [{**third, "lr": 0.3}, {**first, "lr": 0.1}, {**second, "lr": 0.2}], rank=RANK
    )
    saved["param_groups"][1]["lr"] = 0.5
    with pytest.warns(UserWarning, match=r"lr 0\.5 \(here 0\.2\)"):
        turned.load_state_dict(saved)
    assert [group["lr"] for group in turned.param_groups] == [0.3, 0.1, 0.5]
    assert [group["param_names"][0] for group in turned.param_groups] == ["stack", "tall", "square"]


def test_as_many_groups_of_other_names_take_settings_by_place():
    model = Model()
    optimizer = GaLoreAdamW(split(model, ["tall", "wide"]), rank=RANK)
    optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[1]["initial_lr"] = 1.0
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1, 0.2
    other = GaLoreAdamW(split(model, ["tall", "square"]), rank=RANK)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]


def test_without_names_on_one_side_states_go_by_place():
    model = Model()
    optimizer = GaLoreAdamW([{"params": named(model)}], rank=RANK)
    train(model, optimizer, range(2))
    wrapped = [(f"module.{name}", param) for name, param in named(model)]
    for params in (list(model.parameters()), wrapped):
        other = GaLoreAdamW([{"params": params}], rank=RANK)
        saved = optimizer.state_dict()
        if "param_names" in other.param_groups[0]:
            del saved["param_groups"][0]["param_names"]
        other.load_state_dict(saved)
        for name, value in optimizer.state[model.wide].items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(other.state[model.wide][name])
            )
    assert other.param_groups[0]["param_names"][0] == "module.tall"


def test_names_without_a_partner_are_listed():
    model = Model()
    optimizer = GaLoreAdamW([{"params": named(model)}], rank=RANK)
    train(model, optimizer, range(1))
    renamed = [(f"m.{name}" if name != "tall" else name, p) for name, p in named(model)]
    other = GaLoreAdamW([{"params": renamed}], rank=RANK)
    with pytest.raises(SettingError) as raised:
        other.load_state_dict(optimizer.state_dict())
    message = str(raised.value)
    assert "'wide', 'square', 'stack' and 5 more in the checkpoint" in message
    assert "'m.wide', 'm.square', 'm.stack' and 5 more here" in message
    assert not other.state
    fewer = GaLoreAdamW([{"params": named(model)[:-2]}], rank=RANK)
    with pytest.raises(SettingError, match="'scalar', 'empty' in the checkpoint, none here"):
        fewer.load_state_dict(optimizer.state_dict())


def test_sorted_parameters_load_what_one_group_has_saved():
    """What names were given as pairs, before they were sorted, is in the groups of today."""
    model = Model()
    optimizer = GaLoreAdamW([{"params": named(model)}], rank=RANK, update_proj_gap=7)
    train(model, optimizer, range(2))
    sorted_now = GaLoreAdamW(model, rank=RANK, update_proj_gap=7)
    assert len(sorted_now.param_groups) > 1
    sorted_now.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        for name, value in optimizer.state[param].items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(sorted_now.state[param][name])
            )
    with pytest.raises(SettingError, match="3 groups, this optimizer 1 with parameters of several"):
        optimizer.load_state_dict(sorted_now.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_into_names_makes_no_difference(prefix):
    model = Model()
    plain = GaLoreAdamW([{"params": named(model)}], rank=RANK)
    wrapped = GaLoreAdamW(
        [{"params": [(prefix + name, p) for name, p in named(model)[::-1]]}], rank=RANK
    )
    train(model, plain, range(2))
    wrapped.load_state_dict(plain.state_dict())
    assert torch.equal(wrapped.state[model.tall]["exp_avg"], plain.state[model.tall]["exp_avg"])
    assert wrapped.param_groups[0]["param_names"][-1] == f"{prefix}tall"
    plain.load_state_dict(wrapped.state_dict())
    assert plain.param_groups[0]["param_names"][0] == "tall"


def test_cycled_betas_and_rates_are_no_news():
    model = Model()
    make = lambda: GaLoreAdamW([{"params": named(model)}], rank=RANK, lr=1e-3)  # noqa: E731
    optimizer, resumed = make(), make()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10)
    torch.optim.lr_scheduler.OneCycleLR(resumed, 1e-3, total_steps=10)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


def test_frozen_parameters_need_no_partner():
    """What is frozen here and unknown there, or has no state there, has nothing to find."""
    model = Model()
    for name in ("wide", "conv"):
        getattr(model, name).requires_grad_(False)
    everything = GaLoreAdamW(model.named_parameters(), rank=RANK)
    known = [pair for pair in named(model) if pair[0] not in ("wide", "conv")]
    trained = GaLoreAdamW(known, rank=RANK)
    for optimizer in (everything, trained):
        for name, param in model.named_parameters():
            param.grad = gradient(param, 0, PLACES[name]) if param.requires_grad else None
        optimizer.step()
    for source, target in ((everything, trained), (trained, everything)):
        target.load_state_dict(source.state_dict())
        assert torch.equal(
            source.state[model.stack]["exp_avg"], target.state[model.stack]["exp_avg"]
        )
    assert not everything.state.get(model.wide)
    model.wide.requires_grad_(True)
    with pytest.raises(SettingError, match="none in the checkpoint, 'wide' here"):
        everything.load_state_dict(trained.state_dict())


def test_names_that_are_not_unique_are_no_names():
    model = Model()
    doubled = [("same", param) for param in model.parameters()]
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [name for name, _ in doubled]
    other = GaLoreAdamW([{"params": named(model)}], rank=RANK)
    other.load_state_dict(saved)
    assert torch.equal(other.state[model.tall]["basis"], optimizer.state[model.tall]["basis"])
