"""States of sharded parameters in another storage, and values that one process alone refuses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from helpers.cases import CASES, Model
from helpers.sharded import run_case, size_of, whole
from lowrank_optim.parts.checks import SettingError
from lowrank_optim.sharding.local import here

pytestmark = pytest.mark.slow

ROUTES = [(None, "8bit"), ("8bit", None), ("bfloat16", "8bit"), ("8bit", "bfloat16")]
SIDE = {"side": "right"}
CASE = next(case for case in CASES if case.name == "galore-power")


def all_of(states):
    """Return the states of some parameters with their tensors whole."""
    return [
        {key: whole(value) if torch.is_tensor(value) else value for key, value in state.items()}
        for state in states
    ]


def converted(layout, there, storage):
    """Return what a state becomes shard by shard, from shards and from whole tensors, and alone."""
    model, optimizer = run_case(CASE, layout, torch.float32, 2, {**SIDE, "state_dtype": there})
    saved = optimizer.state_dict()
    entire = copy.copy(saved)
    entire["state"] = dict(enumerate(all_of(saved["state"].values())))
    found = []
    for params, state_dict in (
        (model.parameters(), saved),
        (model.parameters(), entire),
        (Model().parameters(), entire),
    ):
        other = CASE.build(params, **SIDE, state_dtype=storage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.load_state_dict(state_dict)
        found.append(all_of(other.state.values()))
    return found


@pytest.mark.parametrize(
    ("layout", "there", "storage"),
    [("fsdp-2", *ROUTES[0]), ("columns", *ROUTES[1]), ("fsdp-2", *ROUTES[2])],
)
def test_shards_are_converted_as_the_whole_is(ranks, layout, there, storage):
    for shards, parts, alone in ranks.run(size_of(layout), converted, layout, there, storage):
        for left, middle, right in zip(shards, parts, alone, strict=True):
            assert left.keys() == middle.keys() == right.keys()
            for key in left:
                for value in (left[key], middle[key]):
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), key


def damaged_here():
    """Spoil a value that the last process alone holds, and return what each says."""
    model, optimizer = run_case(CASE, "fsdp-2", torch.float32, 1, {})
    saved = optimizer.state_dict()
    if torch.distributed.get_rank() == 1:
        here(saved["state"][0]["exp_avg"])[-1, -1] = float("nan")
    other = CASE.build(model.parameters())
    with pytest.raises(SettingError) as raised:
        other.load_state_dict(saved)
    assert not other.state
    return str(raised.value)


def test_what_one_process_refuses_all_do(ranks):
    first, second = ranks.run(2, damaged_here)
    assert first == second
    assert "'exp_avg' of parameter 0" in first
