"""Pairs of runs, one of which updates in the backward pass."""

from __future__ import annotations

import torch

from helpers.cases import GAP, Model, gradient

STEPS = 2 * GAP + 2


def loss_of(model, step, scale=1.0):
    """A loss whose gradients are those of `cases.gradient`, times `scale`."""
    losses = [
        (param * gradient(param, step, position)).sum() * scale
        for position, param in enumerate(model.parameters())
        if param.requires_grad
    ]
    return torch.stack([loss.float() for loss in losses]).sum()


def run(model, optimizer, steps=range(STEPS), passes=1):
    """Train in a plain loop; with several passes a step, each has gradients of its own."""
    for step in steps:
        for number in range(passes):
            loss_of(model, step + 100 * number).backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(case, dtype=torch.float32, **settings):
    """Two equal models with optimizers; the second steps in the backward pass."""
    models = [Model(dtype), Model(dtype)]
    optimizers = [case.build(model.named_parameters()) for model in models]
    optimizers[1].step_in_backward(**settings)
    return (*zip(models, optimizers, strict=True),)


def assert_same_state(left, right):
    """Assert that two optimizers hold the same state and settings, to the bit."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        for name, value in state.items():
            other = theirs["state"][key][name]
            equal = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert equal, name
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        of_torch = {"differentiable": False, "grad_norm": None}  # set by loading; by the mode
        assert {**group, **of_torch} == {**other, **of_torch}
