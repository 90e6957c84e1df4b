"""Random bits: each purpose has kinds of its own."""

import itertools

import pytest
import torch

from lowrank_optim import kernels
from lowrank_optim.functional import CARRIED, FED, MOMENTS, WEIGHT, Noise, draws, random_bits


def test_no_two_purposes_share_a_kind():
    kinds = list(itertools.chain(*draws.ALLOTTED.values()))
    assert kinds == sorted(set(kinds))
    assert max(kinds) < draws.KINDS
    assert {WEIGHT, *MOMENTS, *CARRIED, *FED} == set(kinds)


def test_a_purpose_is_allotted_once_and_kinds_run_out(monkeypatch):
    monkeypatch.setattr(draws, "ALLOTTED", dict(draws.ALLOTTED))
    with pytest.raises(ValueError, match="'weights'"):
        draws.allot("weights", 1)
    assert draws.allot("another", 1) == range(7, 8)
    with pytest.raises(ValueError, match="no 1 kinds"):
        draws.allot("one too many", 1)


def test_every_kind_has_other_bits():
    """The last columns of one kind lie next to the first of the following."""
    drawn = [
        random_bits(Noise(3, 5, 1 << 32), kind, slice(0, 4), 40, torch.device("cpu"))
        for kind in range(draws.KINDS)
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert (one == other).float().mean() < 0.05


def test_kernels_have_the_same_numbers():
    moments, lift = kernels.moments, kernels.lift
    assert (moments.WEIGHT.value, lift.WEIGHT.value) == (WEIGHT, WEIGHT)
    assert (moments.EXP_AVG.value, moments.EXP_AVG_SQ.value) == tuple(MOMENTS)
