"""Updates inside the backward pass at unusual times, in unusual surroundings, and refused."""

from __future__ import annotations

import gc
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

from helpers.cases import CASES, RANK, Model, assert_same, gradient, weights
from helpers.layerwise import assert_same_state, loss_of, pair, run
from lowrank_optim import FiraAdamW, GaLoreAdamW

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_a_second_gradient_before_step_is_refused():
    """The trap of layer-wise updates elsewhere: a step for every micro-batch."""
    (_, _), (model, optimizer) = pair(CASES[0])
    loss_of(model, 0).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"'\w+' of shape .*accumulation_steps"):
        loss_of(model, 1).backward()
    assert_same(weights(model), before)
    optimizer.zero_grad()
    loss_of(model, 1).backward()


def test_float16_gradients_are_refused():
    model = Model(torch.float16)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    optimizer.step_in_backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="float16 gradient, which needs a GradScaler"):
        loss_of(model, 0).backward()
    assert_same(weights(model), before)


def test_grad_scaler_is_refused_with_a_reason():
    (_, _), (model, optimizer) = pair(CASES[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not go with step_in_backward"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps=0: accumulation_steps must be an int of"),
        ({"accumulation_steps": True}, "accumulation_steps must be an int"),
        ({"accumulate": "low"}, "accumulate must be one of 'full', 'projected'"),
        ({"max_norm": 0}, "max_norm must be None or a number above 0"),
        ({"accumulate": "projected"}, "needs the whole gradient"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    model = Model()
    optimizer = FiraAdamW(model.parameters(), rank=RANK)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step_in_backward(**settings)
    loss_of(model, 0).backward()
    assert model.tall.grad is not None


@pytest.mark.parametrize("removed", [False, True])
def test_without_its_optimizer_or_handle_a_hook_does_nothing(removed):
    model = Model()
    optimizer = CASES[0].build(model.parameters())
    handle = optimizer.step_in_backward()
    before = weights(model)
    if removed:
        handle.remove()
    else:
        del optimizer
        gc.collect()
    loss_of(model, 0).backward()
    assert model.tall.grad is not None
    assert_same(weights(model), before)


def test_a_step_without_gradients_comes_first_or_later():
    model = Model()
    optimizer = GaLoreAdamW([model.tall], rank=RANK)
    optimizer.step_in_backward(max_norm=1.0)
    optimizer.add_param_group({"params": [model.wide]})
    optimizer.step()
    loss_of(model, 0).backward()
    assert model.wide.grad is None
    optimizer.step()
    norm = optimizer.grad_norm
    optimizer.step()
    assert optimizer.grad_norm is norm


def test_nothing_projected_is_told_in_this_mode_too():
    layer = nn.Linear(3, 3)
    optimizer = GaLoreAdamW(layer.parameters(), rank=8)
    optimizer.step_in_backward()
    layer(torch.ones(2, 3)).sum().backward()
    with pytest.warns(UserWarning, match="projects none of its 2 parameter"):
        optimizer.step()
    layer(torch.ones(2, 3)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_group_is_added_within_a_step():
    model = Model()
    optimizer = GaLoreAdamW([model.tall], rank=RANK)
    model.tall.grad = gradient(model.tall, 0, 0)
    optimizer.step_param(model.tall)
    optimizer.add_param_group({"params": [model.wide]})
    model.wide.grad = gradient(model.wide, 0, 0)
    optimizer.step_param(model.wide)
    assert optimizer.state[model.wide]["step"] == 1


def test_giving_a_step_up_leaves_the_watch_on_subspaces():
    """A pass that is not the last one opens a step, zero_grad ends it: no trace in the state."""
    states = []
    for gives_up in (False, True):
        model = Model()
        optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
        optimizer.step_in_backward(accumulation_steps=2)
        run(model, optimizer, range(1), passes=2)
        if gives_up:
            loss_of(model, 1).backward()
            optimizer.zero_grad()
        states.append(optimizer)
    assert states[0].state_dict()["state"][0]["pending"] == 0
    assert_same_state(*states)


def test_wrong_settings_leave_the_mode_as_it_is():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    optimizer.step_in_backward()
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.step_in_backward(max_norm=-1)
    loss_of(model, 0).backward()
    assert model.tall.grad is None


def test_the_optimizer_that_asked_last_steps():
    """As after running a notebook's cell again, where the first optimizer is still alive."""
    (model, ordinary), (other, first) = pair(CASES[0])
    second = CASES[0].build(other.named_parameters())
    second.step_in_backward()
    run(model, ordinary)
    run(other, second)
    assert_same(weights(model), weights(other))
    assert not first.state


def test_what_has_been_frozen_with_a_gradient_is_stepped():
    weight = nn.Parameter(torch.randn(13, 7), requires_grad=False)
    optimizer = GaLoreAdamW([weight], rank=RANK)
    weight.grad = torch.randn(13, 7)
    optimizer.step()
    weight.grad = torch.randn(13, 7)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("accumulate", ["full", "projected"])
def test_a_model_is_freed_in_the_middle_of_a_step(accumulate):
    """As after an interrupt in a notebook: what hooks hold must not keep it alive."""
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    optimizer.step_in_backward(accumulation_steps=2, accumulate=accumulate)
    loss_of(model, 0).backward()
    alive = weakref.ref(model.tall)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_compiled_autograd_leaves_the_hooks_alone():
    """It would trace them with the graph, and take numbers such as the step for constants."""
    from torch._dynamo.compiled_autograd import _enable as enabled

    results = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8))
        optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=RANK)
        if layerwise:
            optimizer.step_in_backward()
        for _ in range(3):
            with enabled(torch.compile(backend="eager")):
                model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    assert_same(*results)
