"""Checkpoints that earlier versions wrote are read; `data/` has them, with what came after."""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers.cases import CASES, GAP, Model, train, weights
from helpers.places import TESTS

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
