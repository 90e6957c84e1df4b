"""What a length keeps: bytes, checkpoints, and gradients that are accumulated."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from helpers.cases import GAP, RANK, Model, assert_same, train, weights
from helpers.damages import same
from helpers.layerwise import STEPS, run
from lowrank_optim import (
    AutoRank,
    FrugalAdamW,
    GaLoreAdamW,
    LowRank,
    MuonW,
    predicted_bytes,
    state_bytes,
)
from lowrank_optim.parts.checks import SettingError

SAMPLE = ("sample.exp_avg", "sample.exp_avg_sq")


def galore(params, length, **settings):
    return GaLoreAdamW(
        params, **{"lr": 1e-2, "rank": RANK, "update_proj_gap": GAP, "length": length, **settings}
    )


def trained(length, steps=GAP + 1, **settings):
    model = Model()
    optimizer = galore(model.named_parameters(), length, **settings)
    train(model, optimizer, range(steps))
    return model, optimizer


WIDTHS = {
    (1024, 6): 1,
    (1023, 6): 2,
    (6, 1500): 1,
    (4096, 5): 1,
    (30, 40): 26,
    (9, 5): 5,
    (3, 200, 7): 6,
}
"""Entries a row of the sample: as many as make up 1024, one at least, at most all."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_bytes_of_a_sample_are_predicted(shape, dtype):
    """Two moments an entry in the dtype of the arithmetic, however the others are stored."""
    found = []
    for length in ("published", "adamw"):
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = galore([param], length, state_dtype="8bit", projector="power")
        predicted = predicted_bytes(optimizer)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert state_bytes(optimizer) == predicted
        found.append(predicted)
    entries = torch.Size(shape[:-2]).numel() * max(shape[-2:]) * WIDTHS[shape]
    assert found[1] - found[0] == 2 * entries * (8 if dtype == torch.float64 else 4)
    assert optimizer.state[param]["sample.exp_avg"].shape[-1] == WIDTHS[shape]


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 3000), (3000, 1), (1, 1), (2, 1, 7)])
def test_bytes_where_a_matrix_is_a_vector(shape):
    param = nn.Parameter(torch.ones(shape))
    optimizer = MuonW([param], length="adamw")
    predicted = predicted_bytes(optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    entries = param.numel()  # all, for there are no more than one a row or 1024
    assert state_bytes(optimizer) == predicted == 4 + 4 * param.numel() + 2 * 4 * entries


def test_a_summary_counts_the_sample():
    tables = [
        galore([nn.Parameter(torch.zeros(1024, 1024))], length, rank=64).summary()
        for length in ("published", "adamw")
    ]
    published, adamw = (float(table.splitlines()[2].split()[-3]) for table in tables)
    assert published == pytest.approx(0.75, abs=0.01)
    assert adamw == pytest.approx(0.75 + 2 * 4 * 1024 / 2**20, abs=0.01)


def test_a_budget_is_for_the_sample_too():
    auto = AutoRank(share=0.9, least=0.05, most=0.9)
    settings = {"rank": auto, "projector": "power", "min_dim": 1}

    def built(length, **more):
        params = [nn.Parameter(torch.zeros(96, 64)), nn.Parameter(torch.zeros(40, 80))]
        return galore(params, length, **settings, **more)

    budget = predicted_bytes(built("adamw")) // 2
    for length in ("published", "adamw"):
        optimizer = built(length, state_budget=budget)
        assert 0.9 * budget < predicted_bytes(optimizer) <= budget
        for step in range(GAP + 1):
            for place, param in enumerate(optimizer.param_groups[0]["params"]):
                rng = torch.Generator().manual_seed(10 * step + place)
                param.grad = torch.randn(param.shape, generator=rng)
            optimizer.step()
            assert state_bytes(optimizer) <= budget
    samples = 2 * 4 * (96 * 11 + 80 * 13)
    with pytest.raises(SettingError, match=f"state_budget={samples}: the least ranks take"):
        built("adamw", state_budget=samples).summary()
    built("published", state_budget=samples).summary()


@pytest.mark.parametrize(
    ("there", "here"),
    [pair for pair in itertools.permutations(("published", "rms", "adamw"), 2) if "adamw" in pair],
)
def test_a_checkpoint_with_a_sample_and_one_without_are_told_apart(there, here):
    _, saved = trained(there)
    _, optimizer = trained(here, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SettingError, match=f"length='{there}' in group 0, .*'{here}'.*sample"):
        optimizer.load_state_dict(saved.state_dict())
    assert same(before, optimizer.state_dict())


def test_the_length_of_a_group_without_a_rank_keeps_no_checkpoint_out():
    """It has no sample: as where a preset's default length has changed since."""

    def built(length):
        model = Model()
        groups = [
            {"params": [model.tall], "length": "rms"},
            {"params": [model.vector], "rank": None},
        ]
        optimizer = galore(groups, length)
        train(model, optimizer, range(2))
        return model, optimizer

    model, saved = built("published")
    other, optimizer = built("adamw")
    with pytest.warns(UserWarning, match="from the checkpoint .*length published"):
        optimizer.load_state_dict(saved.state_dict())
    train(model, saved, range(2, 4))
    train(other, optimizer, range(2, 4))
    assert_same(weights(other), weights(model))


@pytest.mark.parametrize("change", ["removed", "sorted", "loaded by name"])
def test_a_sample_has_the_same_entries_wherever_its_parameter_stands(change):
    """Its moments would otherwise be of other entries."""
    settings = {"lr": 1e-2, "rank": RANK, "length": "adamw", "projector": "columns"}

    def stepped(optimizer, pairs, first, last):
        for step in range(first, last):
            for name, param in pairs:
                rng = torch.Generator().manual_seed(10 * step + int(name))
                param.grad = torch.randn(param.shape, generator=rng)
            optimizer.step()

    found = []
    for changed in (False, True):
        pairs = [(str(place), nn.Parameter(torch.ones(37, 41))) for place in range(3)]
        optimizer = GaLoreAdamW([{"params": pairs}], **settings)
        stepped(optimizer, pairs, 0, 3)
        group = optimizer.param_groups[0]
        if changed and change == "removed":
            del group["params"][0]
        elif changed and change == "sorted":
            group["params"].reverse()
        elif changed:
            saved = optimizer.state_dict()
            optimizer = GaLoreAdamW([{"params": pairs[::-1]}], **settings)
            optimizer.load_state_dict(saved)
        stepped(optimizer, pairs, 3, 6)
        found.append([param.detach() for _, param in pairs[change == "removed" :]])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("there", "here"), [("published", "rms"), ("rms", "published")])
def test_of_two_lengths_without_a_sample_the_one_of_the_checkpoint_is_taken(there, here):
    """With its scale, and it is said: as all numbers of a group."""
    model, saved = trained(there, scale=0.5)
    other = Model(seed=9)
    other.load_state_dict(model.state_dict())
    optimizer = galore(other.named_parameters(), here)
    with pytest.warns(UserWarning, match=f"from the checkpoint .*length {there}"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["length"] == there
    assert optimizer.param_groups[0]["scale"] == 0.5
    train(model, saved, range(GAP + 1, 2 * GAP + 2))
    train(other, optimizer, range(GAP + 1, 2 * GAP + 2))
    assert_same(weights(other), weights(model))


def negative(state):
    state["sample.exp_avg_sq"][-1, -1] = -1.0


def not_a_number(state):
    state["sample.exp_avg"][0, 0] = float("nan")


def narrow(state):
    state["sample.exp_avg"] = state["sample.exp_avg"][:, :-1]


def missing(state):
    del state["sample.exp_avg_sq"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (negative, r"'sample\.exp_avg_sq' of parameter 'tall' .* must be .* not negative"),
        (not_a_number, r"'sample\.exp_avg' of parameter 'tall' .* must be finite"),
        (narrow, r"'sample\.exp_avg' of parameter 'tall' .* shape \(13, 6\) .* and \(13, 7\) here"),
        (missing, r"only this optimizer has 'sample\.exp_avg_sq' for parameter 'tall'"),
    ],
)
def test_a_damaged_sample_is_refused_by_name(damage, message):
    model, saved = trained("adamw")
    states = copy.deepcopy(saved.state_dict())
    damage(states["state"][0])
    before = copy.deepcopy(saved.state_dict())
    with pytest.raises(SettingError, match=message):
        saved.load_state_dict(states)
    assert same(before, saved.state_dict())
    train(model, saved, range(GAP + 1, GAP + 3))


def test_a_sample_of_another_dtype_is_converted():
    """Moments of a sample are in the dtype of the arithmetic, whatever wrote the checkpoint."""
    _, saved = trained("adamw")
    states = copy.deepcopy(saved.state_dict())
    for key in SAMPLE:
        states["state"][0][key] = states["state"][0][key].double()
    model, optimizer = trained("adamw", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(states)
    for key in SAMPLE:
        assert optimizer.state[model.tall][key].dtype == torch.float32
        assert torch.equal(optimizer.state[model.tall][key], saved.state_dict()["state"][0][key])


def test_a_group_that_gets_another_length_says_what_its_states_have():
    for there, here in (("published", "adamw"), ("adamw", "rms")):
        model, optimizer = trained(there, 1)
        optimizer.param_groups[0]["length"] = here
        with pytest.raises(RuntimeError, match=r"'sample\.exp_avg' .* of parameter 'tall'"):
            train(model, optimizer, range(1, 2))
        optimizer.param_groups[0]["length"] = there
        train(model, optimizer, range(1, 2))
    model, optimizer = trained("published", 1)
    optimizer.param_groups[0]["length"] = "rms"
    train(model, optimizer, range(1, 2))


def test_projected_accumulation_has_no_entries_for_a_sample():
    model = Model()
    optimizer = galore(model.parameters(), "adamw")
    message = 'length=\'adamw\' in group 0 of GaLoreAdamW: .* length="rms" or "published"'
    with pytest.raises(SettingError, match=message):
        optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
    optimizer = LowRank([model.tall], rank=RANK, length="rms")
    optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
    with pytest.raises(SettingError, match="length='adamw' in group 1 of LowRank"):
        optimizer.add_param_group({"params": [model.wide], "length": "adamw"})
    optimizer.add_param_group({"params": [model.vector], "length": "adamw", "rank": None})


@pytest.mark.parametrize(
    ("factory", "settings"),
    [(LowRank, {"projector": "random"}), (FrugalAdamW, {"state_free": "none"})],
)
def test_projected_gradients_accumulate_to_a_fixed_length(factory, settings):
    results = []
    for layerwise in (False, True):
        model = Model(torch.float64)
        optimizer = factory(
            model.parameters(), lr=1e-3, rank=RANK, update_proj_gap=3, length="rms", **settings
        )
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=3, accumulate="projected")
        run(model, optimizer, range(STEPS), passes=3)
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)
