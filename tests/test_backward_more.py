"""Updates inside the backward pass at unusual times and in unusual surroundings."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from copy import deepcopy

import pytest
import torch
from cases import CASES, RANK, Model, assert_same, gradient, weights
from test_backward import assert_same_state, loss_of, pair, run
from torch import nn

from lowrank_optim import FiraAdamW, GaLoreAdamW, LowRank


def test_autocast_does_not_reach_what_is_accumulated():
    """A backward pass inside the context, as many write it, computes as one outside."""
    states = []
    for inside in (False, True):
        model = Model()
        optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
        optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
        for number in range(2):
            loss = loss_of(model, number)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                loss.backward()
        optimizer.step()
        states.append(optimizer)
    assert_same_state(*states)


def test_the_first_step_may_be_one_that_is_skipped():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK, skip_nonfinite=True)
    optimizer.step_in_backward()
    before = weights(model)
    loss = loss_of(model, 0, float("inf"))
    with optimizer.measure_grad_norm():
        loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(weights(model), before)
    with pytest.raises(RuntimeError, match="measure_grad_norm"):
        loss_of(model, 0).backward()


def test_a_step_that_is_skipped_by_what_has_no_hook_ends_too():
    model = Model()
    model.wide.requires_grad_(False)
    optimizer = GaLoreAdamW([model.tall, model.wide], rank=RANK, skip_nonfinite=True)
    optimizer.step_in_backward()
    model.wide.requires_grad_(True)
    for scale in (float("inf"), 1.0):
        with optimizer.measure_grad_norm():
            model.tall.sum().backward()
        (model.tall.sum() + model.wide.sum() * scale).backward()
        optimizer.step()
        model.zero_grad()
    assert optimizer.skipped_steps == 1
    assert [optimizer.state[p]["step"] for p in (model.tall, model.wide)] == [2, 1]


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


def test_a_group_that_needs_whole_gradients_cannot_join_projected_accumulation():
    model = Model()
    optimizer = LowRank([model.tall], rank=RANK)
    optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
    with pytest.raises(ValueError, match="NormScaled in group 1 of LowRank"):
        optimizer.add_param_group({"params": [model.wide], "residual": "norm_scaled"})
    assert len(optimizer.param_groups) == 1


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


@pytest.mark.parametrize("copy", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_clips_by_the_same_norm(copy):
    _, (model, optimizer) = pair(CASES[0], max_norm=3.0)
    run(model, optimizer, range(3))
    other, copied = copy((model, optimizer))
    copied.step_in_backward(max_norm=3.0)
    run(model, optimizer, range(3, 6))
    run(other, copied, range(3, 6))
    assert_same(weights(model), weights(other))


def test_the_optimizer_that_asked_last_steps():
    """As after running a notebook's cell again, where the first optimizer is still alive."""
    (model, ordinary), (other, first) = pair(CASES[0])
    second = CASES[0].build(other.named_parameters())
    second.step_in_backward()
    run(model, ordinary)
    run(other, second)
    assert_same(weights(model), weights(other))
    assert not first.state


def test_only_watched_groups_skip():
    results = []
    for layerwise in (False, True):
        model = Model()
        optimizer = GaLoreAdamW(
            [{"params": [model.tall], "skip_nonfinite": True}, {"params": [model.wide]}], rank=RANK
        )
        loss = model.tall.square().sum() + model.wide.sum() * float("inf")
        if layerwise:
            optimizer.step_in_backward()
            with optimizer.measure_grad_norm():
                loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        assert optimizer.skipped_steps == 0
        results.append(model.tall.detach())
    assert torch.equal(*results)


def test_what_cannot_be_stepped_is_told_when_it_is_measured():
    embedding = nn.Embedding(20, 12, sparse=True)
    optimizer = FiraAdamW(embedding.parameters(), rank=RANK)
    optimizer.step_in_backward()
    with (
        pytest.raises(RuntimeError, match="has a sparse gradient, which cannot be projected"),
        optimizer.measure_grad_norm(),
    ):
        embedding(torch.tensor([1])).sum().backward()


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
