"""Updates inside the backward pass at unusual times and in unusual surroundings."""

from __future__ import annotations

import pickle
import warnings
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
