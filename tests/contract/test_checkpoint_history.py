"""A checkpoint of this package loads into an optimizer built alike, whatever came before it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from helpers.cases import CASES, GAP, Model, gradient
from lowrank_optim import AutoRank, GaLoreAdamW

NUMBERS = {
    "lr": [3e-3], "scale": [0.7], "update_proj_gap": [1, 3, 7], "seed": [5], "weight_decay": [0.2],
    "betas": [(0.8, 0.9)], "stagger": [False], "stochastic_rounding": [True],
}  # fmt: skip
CHANGES = [(key, value) for key, values in NUMBERS.items() for value in values]
FLAGS = st.lists(st.booleans(), min_size=9, max_size=9)
EVENTS = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, GAP + 1)),
    st.tuples(st.just("freeze"), FLAGS),
    st.tuples(st.just("number"), st.sampled_from(CHANGES)),
    st.tuples(st.just("rehearse"), st.none()),
    st.tuples(st.just("bad step"), st.none()),
)
GROUPS = {
    "one": lambda model: model.parameters(),
    "names": lambda model: model.named_parameters(),
    "two": lambda model: [
        {"params": list(model.parameters())[:4]},
        {"params": list(model.parameters())[4:]},
    ],
}


def step(model, optimizer, number):
    for position, param in enumerate(model.parameters()):
        param.grad = gradient(param, number, position) if param.requires_grad else None
    optimizer.step()


def freeze(model, flags):
    for param, flag in zip(model.parameters(), flags, strict=True):
        param.requires_grad_(not flag)
        param.grad = None


def live(model, optimizer, events):
    """Do what happens to a run, and return its number of steps."""
    count = 0
    for event, value in events:
        if event == "steps":
            for _ in range(value):
                step(model, optimizer, count)
                count += 1
        elif event == "freeze":
            freeze(model, value)
        elif event == "number":
            for group in optimizer.param_groups:
                group[value[0]] = value[1]
        elif event == "rehearse":
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            for param in model.parameters():
                param.grad = torch.zeros_like(param) if param.requires_grad else None
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            for group in optimizer.param_groups:
                group["skip_nonfinite"] = True
            for param in model.parameters():
                param.grad = torch.full_like(param, float("nan")) if param.requires_grad else None
            optimizer.step()
    return count


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:settings here and in the checkpoint", "ignore:.* projects none")
@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(GROUPS)), FLAGS, st.lists(EVENTS, max_size=4), st.none() | FLAGS)
def test_any_run_goes_on_from_its_checkpoint(case, groups, frozen, events, then):
    """To the bit; or, where other parameters are frozen from there, without an error."""
    model = Model()
    freeze(model, frozen)
    optimizer = case.build(GROUPS[groups](model))
    count = live(model, optimizer, events)
    other_model = copy.deepcopy(model)
    if then is not None:
        freeze(other_model, then)
    other = case.build(GROUPS[groups](other_model))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for number in range(count, count + GAP + 1):
        step(other_model, other, number)
        if then is None:
            step(model, optimizer, number)
    if then is None:
        for left, right in zip(model.parameters(), other_model.parameters(), strict=True):
            assert torch.equal(left, right)


def test_a_budget_that_more_parameters_share_makes_ranks_smaller():
    params = [torch.nn.Parameter(torch.randn(40, 30)) for _ in range(3)]
    make = lambda: GaLoreAdamW(  # noqa: E731
        params,
        rank=AutoRank(share=1.0, least=0.1, most=0.9),
        min_dim=1,
        state_budget=9000,
        update_proj_gap=2,
        stagger=False,
    )
    for param in params[1:]:
        param.requires_grad_(False)
    optimizer = make()
    for _ in range(3):
        params[0].grad = torch.randn(40, 30)
        optimizer.step()
    assert optimizer.state[params[0]]["basis"].shape == (30, 20)
    for param in params:
        param.requires_grad_(True)
    other = make()
    other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(40, 30)
        other.step()
    assert [other.state[param]["basis"].shape[-1] for param in params] == [6, 6, 6]


def test_how_this_machine_steps_is_not_taken_from_a_checkpoint():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=3)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(foreach=True, mine="x")
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert "foreach" not in group
    assert group["mine"] == "x"
    rate = group["lr"] = torch.tensor(1e-3)
    del saved["param_groups"][0]["lr"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is rate


def test_states_that_torch_names_go_by_its_names():
    """`get_state_dict` calls parameters by the model's names, whatever the optimizer's order."""
    model = Model()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=3)
    step(model, optimizer, 0)
    _, saved = get_state_dict(model, optimizer)
    expected = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    turned = GaLoreAdamW(list(model.named_parameters())[::-1], rank=3)
    get_state_dict(model, turned)
    set_state_dict(model, turned, model_state_dict=model.state_dict(), optim_state_dict=saved)
    for name, param in model.named_parameters():
        assert torch.equal(turned.state[param]["exp_avg"], expected[name])


def test_a_resumed_run_saves_its_settings_in_the_same_order():
    """A checkpoint as text, or its hash, is then that of a run left alone."""
    model = Model()
    optimizer = GaLoreAdamW(model, rank=3)
    step(model, optimizer, 0)
    saved = optimizer.state_dict()
    resumed = GaLoreAdamW(model, rank=3)
    resumed.load_state_dict(saved)
    again = resumed.state_dict()
    for group, other in zip(saved["param_groups"], again["param_groups"], strict=True):
        assert list(group) == list(other)
    assert [list(state) for state in saved["state"].values()] == [
        list(state) for state in again["state"].values()
    ]
