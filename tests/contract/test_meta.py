"""Parameters on "meta" can be stepped, and "meta" as a context changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.cases import CASES, GAP, Model, train
from helpers.loops import KINDS
from lowrank_optim import GaLoreAdamW
from lowrank_optim.parts.projectors import PROJECTORS

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def step_on_meta(model, optimizer, steps):
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()


def kinds(optimizer, model):
    """Shapes and dtypes of the state of each parameter."""
    return [
        {
            key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
            for key, value in optimizer.state[param].items()
        }
        for param in model.parameters()
    ]


FIRST = list({case.factory: case for case in reversed(CASES)}.values())


@pytest.mark.parametrize("case", FIRST + [case for case in KINDS if case not in FIRST], ids=str)
def test_steps_on_meta_make_the_state_of_steps_on_a_device(case):
    real, model = Model(), Model().to("meta")
    optimizer = case.build(model.parameters())
    twin = case.build(real.parameters())
    step_on_meta(model, optimizer, GAP + 2)
    train(real, twin, range(GAP + 2))
    if not case.chooses:  # ranks follow from values
        assert kinds(optimizer, model) == kinds(twin, real)
    for param in model.parameters():
        state = optimizer.state[param]
        assert float(state["step"]) == GAP + 2
        assert all(v.is_meta for k, v in state.items() if torch.is_tensor(v) and k not in COUNTS)
    optimizer.load_state_dict(optimizer.state_dict())
    step_on_meta(model, optimizer, 1)


COUNTS = ("step", "age")


@pytest.mark.parametrize("projector", [name for name, p in PROJECTORS.items() if p.captures])
def test_counts_of_capturable_steps_are_numbers_too(projector):
    model = Model().to("meta")
    rank = 0.5 if PROJECTORS[projector].whole else 3
    optimizer = GaLoreAdamW(model.parameters(), rank=rank, projector=projector, capturable=True)
    step_on_meta(model, optimizer, 2)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2}


def test_real_state_goes_to_meta_and_not_back():
    real, model = Model(), Model().to("meta")
    optimizer, other = (GaLoreAdamW(m.parameters(), rank=3) for m in (real, model))
    train(real, optimizer, range(2))
    other.load_state_dict(optimizer.state_dict())
    step_on_meta(model, other, 1)
    assert other.state[model.tall]["basis"].is_meta
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 .* is on \"meta\""):
        optimizer.load_state_dict(other.state_dict())


@each_case
def test_meta_as_a_context_changes_nothing(case):
    model = Model()
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, range(GAP + 1))
    optimizer._session.grad_norm = torch.tensor(2.5)
    saved = optimizer.state_dict()
    other_model = Model()
    other_model.load_state_dict(model.state_dict())
    storage = {} if "state_dtype" in case.settings else {"state_dtype": "8bit"}
    converted = case.build(other_model.parameters(), **storage)
    other = case.build(other_model.named_parameters())
    with torch.device("meta"):
        other.load_state_dict(saved)
        converted.load_state_dict(saved)
        again = other.state_dict()
    assert float(other.grad_norm) == 2.5
    for key, state in saved["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["state"][key][name]))
    for some in (other, converted):
        tensors = [v for s in some.state.values() for v in s.values() if torch.is_tensor(v)]
        assert not any(value.is_meta for value in tensors)
    train(other_model, other, range(GAP + 1, GAP + 2))
    train(model, optimizer, range(GAP + 1, GAP + 2))
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))
