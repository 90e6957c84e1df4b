"""Loops that clip gradients which layer-wise updates have used."""

from __future__ import annotations

import math
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW


def layerwise(**settings):
    torch.manual_seed(0)
    model = nn.Linear(7, 13)
    optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, eps=1.0, rank=3)  # eps: lengths count
    optimizer.step_in_backward(**settings)
    return model, optimizer


def backward(model):
    loss = model(torch.ones(2, 7)).square().mean()
    loss.backward()
    return loss


def clipping_loop(model, optimizer, steps=2):
    for _ in range(steps):
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def test_a_loop_that_clips_in_vain_is_told_once():
    model, optimizer = layerwise()
    with pytest.warns(UserWarning, match=r"clip_grad_norm_ finds no gradients.*max_norm") as said:
        clipping_loop(model, optimizer)
    assert len(said) == 1
    assert said[0].filename == __file__


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_norm_that_was_passed_is_the_answer(max_norm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipping_loop(*layerwise(max_norm=max_norm))


def test_a_loop_that_does_not_clip_is_not_told():
    model, optimizer = layerwise()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)
        optimizer.step()


def test_an_infinite_norm_clips_nothing():
    results = []
    for settings in ({}, {"max_norm": math.inf}):
        model, optimizer = layerwise(**settings)
        backward(model)
        optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(*results)


def lightning_closure(model, value, algorithm):
    """What Lightning gives to `step`: a partial that holds its module, which knows its trainer."""
    trainer = SimpleNamespace(gradient_clip_val=value, gradient_clip_algorithm=algorithm)
    module = SimpleNamespace(_trainer=trainer)
    return partial(lambda module, run: run(), module, lambda: backward(model))


def test_the_norm_of_lightnings_trainer_is_honoured():
    clipped, optimizer = layerwise()
    optimizer.step(lightning_closure(clipped, 1e-3, None))
    told, other = layerwise(max_norm=1e-3)
    other.step(lambda: backward(told))
    free, third = layerwise()
    third.step(lightning_closure(free, None, None))
    assert torch.equal(clipped.weight, told.weight)
    assert not torch.equal(clipped.weight, free.weight)


def test_clipping_by_value_is_told():
    model, optimizer = layerwise()
    with pytest.warns(UserWarning, match=r"gradient_clip_val=0\.5 finds no gradients"):
        optimizer.step(lightning_closure(model, 0.5, "value"))
