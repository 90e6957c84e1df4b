"""Norms in layer-wise updates: clipping by the one before or exactly, and steps left out."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from helpers.cases import CASES, RANK, Model, assert_same, weights
from helpers.layerwise import STEPS, loss_of, pair, run
from lowrank_optim import FiraAdamW, GaLoreAdamW

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def clipped(model, optimizer, max_norm, steps=range(STEPS)):
    """An ordinary loop with torch's clipping; return the norms it found."""
    norms = []
    for step in steps:
        loss_of(model, step).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("case", [case for case in CASES if not case.coarse], ids=str)
@pytest.mark.parametrize("again", ["graph", "forward"])
def test_two_passes_clip_exactly(case, again):
    (model, ordinary), (other, layerwise) = pair(case, torch.float64, max_norm=3.0)
    norms = clipped(model, ordinary, 3.0)
    assert min(norms) > 4
    for step, norm in enumerate(norms):
        loss = loss_of(other, step)
        with layerwise.measure_grad_norm():
            loss.backward(retain_graph=again == "graph")
            assert all(param.grad is None for param in other.parameters())
        (loss if again == "graph" else loss_of(other, step)).backward()
        layerwise.step()
        torch.testing.assert_close(layerwise.grad_norm.to(norm.dtype), norm, rtol=1e-6, atol=0)
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-6, atol=1e-6)


def test_clipping_by_the_step_before():
    """Factor min(1, max / n) with n the last norm of all, or the gradient's own if larger."""
    (model, ordinary), (other, layerwise) = pair(CASES[0], max_norm=3.0)
    before = 0.0
    for step, scale in enumerate((1.0, 1.0, 30.0, 0.1)):
        loss_of(model, step, scale).backward()
        norms = [float(param.grad.norm()) for param in model.parameters()]
        for param, norm in zip(model.parameters(), norms, strict=True):
            param.grad *= min(1.0, 3.0 / (max(before, norm) + 1e-6))
        before = sum(norm**2 for norm in norms) ** 0.5
        ordinary.step()
        ordinary.zero_grad()
        loss_of(other, step, scale).backward()
        layerwise.step()
        assert float(layerwise.grad_norm) == pytest.approx(before, rel=1e-5)
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-5)


def test_the_norm_before_is_saved():
    (_, _), (model, optimizer) = pair(CASES[0], max_norm=3.0)
    run(model, optimizer, range(3))
    resumed_model = deepcopy(model)
    saved = deepcopy(optimizer.state_dict())
    run(model, optimizer, range(3, STEPS))
    resumed = CASES[0].build(resumed_model.named_parameters())
    resumed.load_state_dict(saved)
    resumed.step_in_backward(max_norm=3.0)
    run(resumed_model, resumed, range(3, STEPS))
    assert_same(weights(model), weights(resumed_model))
    assert resumed.grad_norm == optimizer.grad_norm


def test_skip_nonfinite_needs_the_norm_first_and_then_leaves_no_trace():
    case = CASES[0]
    results = []
    for bad in (False, True):
        model = Model()
        optimizer = case.build(model.parameters(), skip_nonfinite=True)
        optimizer.step_in_backward(max_norm=100.0)
        for step in range(STEPS):
            if bad and step == 5:
                with optimizer.measure_grad_norm():
                    loss_of(model, step, float("inf")).backward()
                loss_of(model, step, float("inf")).backward()
                optimizer.step()
                assert optimizer.skipped_steps == 1
            with optimizer.measure_grad_norm():
                loss_of(model, step).backward()
            loss_of(model, step).backward()
            optimizer.step()
        results.append(weights(model))
    assert_same(*results)
    model = Model()
    optimizer = case.build(model.parameters(), skip_nonfinite=True)
    optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match=r"skip_nonfinite=True.*measure_grad_norm"):
        loss_of(model, 0).backward()
    assert_same(weights(model), weights(Model()))


def test_measuring_what_is_accumulated_is_refused():
    (_, optimizer), (_, layerwise) = pair(CASES[0], accumulation_steps=2)
    with pytest.raises(RuntimeError, match="measure_grad_norm is for step_in_backward"):
        optimizer.measure_grad_norm()
    with (
        pytest.raises(RuntimeError, match="clip_grad_norm_"),
        layerwise.measure_grad_norm(),
    ):
        pass


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


@pytest.mark.parametrize("copy", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_clips_by_the_same_norm(copy):
    _, (model, optimizer) = pair(CASES[0], max_norm=3.0)
    run(model, optimizer, range(3))
    other, copied = copy((model, optimizer))
    copied.step_in_backward(max_norm=3.0)
    run(model, optimizer, range(3, 6))
    run(other, copied, range(3, 6))
    assert_same(weights(model), weights(other))


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
