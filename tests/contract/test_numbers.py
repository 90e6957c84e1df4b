"""Numbers of parts in groups: every number of every method, from what the parts declare."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from helpers.cases import PRESETS, assert_same, gradient
from lowrank_optim import (
    AutoRank,
    LowRank,
)
from lowrank_optim.parts.numbers import Number
from lowrank_optim.settings import NUMBERS, numbers_in

SHAPES = ((13, 7), (5, 11), (3, 8, 5), (11,))
OTHER = {float: (0.35, 1.35), int: (2,), bool: (True, False)}
"""Values to try of a number's type; the first that is allowed and another than the default is."""
OWN_NAMES = {"keep": "momentum"}
"""What the constructor of Trion calls a number."""
FILE = TESTS / "data" / "version-1" / "methods.pt"


def params_of(seed: int = 0) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for position, param in enumerate(group["params"]):
                param.grad = gradient(param, step, position)
        optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and states, as tensors by name."""
    found = {}
    for position, param in enumerate(optimizer.param_groups[0]["params"]):
        found[f"{position}"] = param.detach().clone()
        for key, value in optimizer.state[param].items():
            found[f"{position}.{key}"] = torch.as_tensor(value).clone()
    return found


def build(preset: type[LowRank], own: Mapping[str, Any] = {}, **settings: Any) -> LowRank:
    size = {} if "update_proj_gap" not in inspect.signature(preset).parameters else {
        "rank": 3, "update_proj_gap": 3,
    }  # fmt: skip
    if "rank_share" in (*own, *settings) or settings.pop("auto", False):
        size.update(rank="auto", min_dim=1)
    return preset([{"params": params_of(), **own}], **{"lr": 1e-2, **size, **settings})


def numbers_of_group(group: Mapping[str, Any]) -> dict[str, Number]:
    return numbers_in(group)


def other_value(number: Number, default: Any) -> Any:
    for value in OTHER[number.kind]:
        if number.good(value) and value != default:
            return value
    raise AssertionError(f"no other value of {number}")


def all_numbers() -> list[tuple[type[LowRank], str]]:
    found = []
    for preset in PRESETS:
        group = build(preset).param_groups[0]
        found += [(preset, key) for key in numbers_of_group(group)]
    return found


EVERY = all_numbers()


def test_every_number_of_our_parts_is_tried_with_a_method():
    tried = {key for _, key in EVERY}
    assert tried | set(AutoRank.numbers) == set(NUMBERS)


@pytest.mark.parametrize(("preset", "key"), EVERY)
def test_a_number_in_a_group_is_that_of_the_constructor(preset, key):
    default = build(preset).param_groups[0]
    value = other_value(numbers_of_group(default)[key], default[key])
    named = key if key in inspect.signature(preset).parameters else OWN_NAMES.get(key, key)
    if named not in inspect.signature(preset).parameters:
        pytest.skip(f"the constructor has no {key}")
    theirs, ours = build(preset, **{named: value}), build(preset, {named: value})
    assert ours.param_groups[0][key] == theirs.param_groups[0][key] == value
    for optimizer in (theirs, ours):
        train(optimizer, range(5))
    assert_same(held(ours), held(theirs))
    plain = build(preset)
    train(plain, range(5))
    assert any(
        not torch.equal(x, y)
        for x, y in zip(held(plain).values(), held(ours).values(), strict=True)
    )
