"""Checkpoints that earlier versions wrote are read; `data/` has them, with what came after."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from helpers.cases import CASES, GAP, Model, train, weights
from helpers.places import TESTS
from lowrank_optim import FiraAdamW, MuonW, TrionW

FILES = sorted((TESTS / "data").glob("*.pt"))
"""Of version 0.4 after GAP + 1 steps: `model`, `optimizer`, and the weights two steps later."""
DROPPED = ("square", "stack", "conv", "narrow")


def model_of(saved):
    model = Model()
    for name in DROPPED:
        delattr(model, name)
    model.load_state_dict(saved)
    return model


def test_there_are_files():
    assert [path.stem for path in FILES] == ["error-feedback-bf16", "frugal-blocks", "galore-8bit"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("names", [True, False])
def test_a_run_of_an_earlier_version_goes_on(path, names):
    saved = torch.load(path, weights_only=True)
    case = next(case for case in CASES if case.name == path.stem)
    model = model_of(saved["model"])
    optimizer = case.build(model.named_parameters() if names else model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(GAP + 1, GAP + 3))
    for name, value in weights(model).items():
        torch.testing.assert_close(value, saved["later"][name], rtol=1e-5, atol=1e-6)


def test_a_setting_that_had_no_name_yet_means_what_it_did(monkeypatch):
    saved = torch.load(FILES[-1], weights_only=True)
    case = next(case for case in CASES if case.name == FILES[-1].stem)
    optimizer = case.build(model_of(saved["model"]).parameters())
    monkeypatch.setattr("lowrank_optim.checkpoints.load.BEFORE", {"stochastic_rounding": True})
    del saved["optimizer"]["param_groups"][0]["stochastic_rounding"]
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    strange = torch.optim.AdamW(model_of(saved["model"]).parameters()).state_dict()
    other = case.build(model_of(saved["model"]).parameters())
    with pytest.warns(UserWarning, match="lr"):
        other.load_state_dict(strange)
    assert other.param_groups[0]["stochastic_rounding"] is False


FLAT, NESTED = StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions()
FIRST = {
    "muon": (MuonW, {}, {"momentum": 0.8, "nesterov": False, "iterations": 5}),
    "trion": (TrionW, {"rank": 3}, {"keep": 0.7}),
    "fira": (FiraAdamW, {"rank": 3}, {"limiter": 1.2}),
}
"""Of the first layout: how they are built, and numbers that stood in texts there."""


def of_the_first_layout(name):
    """Return a model, an optimizer, what `get_optimizer_state_dict` gave, and the numbers."""
    saved = torch.load(TESTS / "data" / "version-1" / "methods.pt", weights_only=True)[name]
    preset, settings, numbers = FIRST[name]
    model = nn.ParameterDict({key: nn.Parameter(x) for key, x in saved["model"].items()})
    optimizer = preset(model.values(), lr=1e-2, **settings)
    names, (group,) = list(model), saved["optimizer"]["param_groups"]
    states = {names[place]: state for place, state in saved["optimizer"]["state"].items()}
    nested = {"state": states, "param_groups": [{**group, "params": names}]}
    return model, optimizer, nested, numbers


def flat(nested):
    """Return the same as `flatten_optimizer_state_dict=True` makes it."""
    (group,) = nested["param_groups"]
    states = {
        f"state.{name}.{key}": value
        for name, state in nested["state"].items()
        for key, value in state.items()
    }
    kept = {key: value for key, value in group.items() if key != "params"}
    return states | {
        f"param_groups.{name}.{key}": kept[key] for name in group["params"] for key in kept
    }


@pytest.mark.filterwarnings("ignore:settings here and in the checkpoint differ")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize(("is_flat", "on_disk"), [(True, False), (True, True), (False, True)])
def test_a_distributed_checkpoint_of_the_first_layout_loads_over_one_of_now(
    name, is_flat, on_disk, tmp_path
):
    """The numbers are those in its texts, not those of the optimizer, which fill the new keys."""
    model, optimizer, nested, numbers = of_the_first_layout(name)
    options, saved = (FLAT, flat(nested)) if is_flat else (NESTED, nested)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    if on_disk:
        dcp.save(saved, checkpoint_id=tmp_path)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(whole, checkpoint_id=tmp_path, planner=planner)
    else:
        whole = {**whole, **saved}
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in numbers} == numbers
    for param, state in nested["state"].items():
        for key, value in state.items():
            held = optimizer.state[model[param]][key]
            assert torch.equal(torch.as_tensor(held), torch.as_tensor(value))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_flat_checkpoint_of_the_first_layout_alone_is_refused_by_torch(tmp_path):
    """Before anything of ours is asked: it looks for every key that the groups have now."""
    model, optimizer, nested, _ = of_the_first_layout("fira")
    saved = flat(nested)
    before = dict(optimizer.param_groups[0])
    with pytest.raises(KeyError, match=r"param_groups\.\w+\.length"):
        set_optimizer_state_dict(model, optimizer, saved, options=FLAT)
    dcp.save(saved, checkpoint_id=tmp_path)
    whole = get_optimizer_state_dict(model, optimizer, options=FLAT)
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load(whole, checkpoint_id=tmp_path)
    assert optimizer.param_groups[0] == before
