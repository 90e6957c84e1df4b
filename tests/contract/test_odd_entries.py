"""What stands in groups and states and does not belong there is refused by name."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from helpers.cases import PRESETS
from lowrank_optim import (
    CondaW,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    SettingError,
    TrionW,
)


def a_matrix(shape=(8, 6)):
    return torch.nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "value"),
    [((8, 6), 3), ((5,), 3), ((8, 6), "1"), ((5,), [1.0]), ((8, 6), torch.ones(()))],
)
def test_an_entry_of_a_state_of_another_type_is_refused_by_name(shape, value):
    params = [a_matrix((9, 7)), a_matrix(shape)]
    optimizer = FiraAdamW(params, rank=2)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    state, before = optimizer.state[params[1]], [param.detach().clone() for param in params]
    for key, held in list(state.items()):
        if isinstance(held, torch.Tensor) == isinstance(value, torch.Tensor):
            continue
        state[key] = value
        wanted = "a tensor" if isinstance(held, torch.Tensor) else "a number"
        message = (
            rf"^'{key}' is of type {type(value).__name__}, and should be {wanted}, in the state of "
            rf"parameter 1 of group 0, of shape {re.escape(str(shape))}"
        )
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        state[key] = held
    assert all(map(torch.equal, params, before))
    optimizer.step()


@pytest.mark.parametrize("value", [None, 5, a_matrix().device])
def test_what_is_no_list_of_parameters_is_refused_by_the_number_of_its_group(value):
    optimizer = GaLoreAdamW([{"params": [a_matrix()]}, {"params": [a_matrix()]}], rank=2)
    good = optimizer.param_groups[1]["params"]
    optimizer.param_groups[1]["params"] = value
    message = re.escape(f"params={value!r} in group 1: params must be a list of tensors")
    for act in (optimizer.step, optimizer.zero_grad, optimizer.state_dict, optimizer.summary):
        with pytest.raises(SettingError, match=message):
            act()
    optimizer.param_groups[1]["params"] = good
    optimizer.step()


@pytest.mark.parametrize("value", [None, "weight", ("weight", torch.ones(8, 6))], ids=type)
def test_what_is_no_tensor_among_parameters_is_refused_by_its_place(value):
    params = [a_matrix(), a_matrix()]
    optimizer = GaLoreAdamW(params, rank=2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["params"][1] = value
    kind = type(value).__name__
    for act in (optimizer.step, optimizer.zero_grad, optimizer.state_dict, optimizer.summary):
        with pytest.raises(
            SettingError, match=f"'params' of group 0 has a value of type {kind} at place 1: every"
        ):
            act()
    optimizer.param_groups[0]["params"][1] = params[1]
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 2


@pytest.mark.parametrize(
    ("preset", "part"),
    [
        (preset, part)
        for preset in PRESETS
        for part in ("feed", "rule", "projector", "residual")
        if part not in inspect.signature(preset).parameters
        and not (part == "feed" and preset not in (CondaW, LDAdamW, TrionW))
    ],
)
def test_a_part_that_a_method_fixes_is_refused_by_name(preset, part):
    """Also through a class of the user's own, whose name is then told."""
    own = type("Mine", (preset,), {})
    value = {"feed": "gradient", "rule": "adam", "projector": "svd", "residual": "drop"}[part]
    for each in (preset, own):
        message = rf"^{part}='{value}': {each.__name__} is the method with {part}=.* any {part}$"
        with pytest.raises(SettingError, match=message):
            each([a_matrix()], rank=2, **{part: value})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"skipped_steps": 3}, "skipped_steps=3 in group 1: the optimizer keeps it by itself"),
        ({"skipped_steps": 0}, "skipped_steps=0 in group 1: the optimizer keeps it by itself"),
        ({"grad_norm": 1.0}, r"grad_norm=1\.0 in group 1: the optimizer keeps it by itself"),
        ({"state_version": 1}, "state_version=1 in group 1: this package writes 2"),
        ({"state_version": "x"}, "state_version='x' in group 1: this package writes 2"),
    ],
)
def test_what_the_optimizer_keeps_in_its_groups_is_no_setting(own, message):
    first, second = a_matrix(), {"params": [a_matrix()], **own}
    with pytest.raises(SettingError, match=message):
        GaLoreAdamW([{"params": [first]}, second], rank=2)
    optimizer = GaLoreAdamW([first], rank=2)
    with pytest.raises(SettingError, match=message):
        optimizer.add_param_group(second)
    assert len(optimizer.param_groups) == 1


def test_what_the_optimizer_keeps_goes_with_a_copy_of_its_groups():
    param = a_matrix()
    optimizer = GaLoreAdamW([param], rank=2, skip_nonfinite=True)
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    group = {**optimizer.param_groups[0], "params": [a_matrix()]}
    other = GaLoreAdamW([group])
    other.add_param_group({**group, "params": [a_matrix()]})
    assert other.skipped_steps == 1
    other = GaLoreAdamW([param], rank=2, skip_nonfinite=True)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1


class SAM(torch.optim.Optimizer):
    """A wrapper as there are many for sharpness-aware steps: its numbers stand in the groups."""

    def __init__(self, params, base, key="rho", **settings):
        super().__init__(params, {key: 0.05, "adaptive": False, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups


def test_a_number_of_a_wrapper_that_is_called_as_one_of_ours_is_told():
    message = (
        r"'rho' in group 0 is not read by what the group has.*GeneralErrorFeedback.*remove the key"
        "; a wrapper that keeps a number of its own in the groups has to give it another name"
    )
    with pytest.raises(SettingError, match=message):
        SAM([a_matrix()], GaLoreAdamW, rank=2)
    group = SAM([a_matrix()], GaLoreAdamW, "sam_rho", rank=2).param_groups[0]
    assert (group["sam_rho"], group["adaptive"], group["rank"]) == (0.05, False, 2)
