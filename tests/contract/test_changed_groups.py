"""Groups that trainers change: parameters taken out and put in, groups popped and assigned."""

from __future__ import annotations

import copy
import inspect
import io
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.cases import CASES, GAP, PRESETS, RANK, Model, gradient
from lowrank_optim import (
    DCT,
    SVD,
    AutoRank,
    Blocks,
    Compensated,
    ErrorFeedback,
    GaLoreAdamW,
    LDAdamW,
    Lion,
    LowRank,
    Muon,
    NormScaled,
    Power,
    StateFree,
)
from lowrank_optim.parts.numbers import with_numbers
from lowrank_optim.parts.rank import rank_asked
from lowrank_optim.settings.values import PARTS, part_of

CHANGED = [case for case in CASES if str(case) in ("galore", "dct", "fira", "muon", "trion")]


def a_matrix(rows=8, cols=6):
    return nn.Parameter(torch.randn(rows, cols))


@pytest.mark.parametrize("case", CHANGED, ids=str)
@pytest.mark.filterwarnings("ignore:.*projects none of its 1 parameter")
@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_parameter_goes_on_wherever_its_place_is(case, rng):
    """Each does what it does in an optimizer of its own, in the steps in which it is in a group."""
    model, alone = Model(), Model()
    params, others = list(model.parameters()), list(alone.parameters())
    same = {"stagger": False}
    optimizer = case.build(params, **same)
    singles = [case.build([param], **same) for param in others]
    for step in range(GAP + 2):
        reorder(optimizer, params, rng)
        here = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for place, (param, other) in enumerate(zip(params, others, strict=True)):
            param.grad = gradient(param, step, place)
            other.grad = gradient(other, step, place) if id(param) in here else None
        optimizer.step()
        for single in singles:
            single.step()
        assert all(map(torch.equal, params, others))


def reorder(optimizer, params, rng):
    """Shuffle parameters over new groups, all but one of them, or edit the lists in place."""
    template = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    inside = rng.sample(params, len(params) - 1)
    cut = rng.randrange(1, len(inside))
    if rng.random() < 0.5:
        optimizer.param_groups = [
            {**copy.deepcopy(template), "params": part} for part in (inside[:cut], inside[cut:])
        ]
    else:
        del optimizer.param_groups[1:]
        optimizer.param_groups[0]["params"][:] = inside


@pytest.mark.parametrize("preset", PRESETS)
def test_state_of_what_was_taken_out_is_not_saved_and_stays(preset):
    model = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 9))
    optimizer = preset([{"params": list(model.named_parameters())}], **rank_of(preset))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    first = optimizer.param_groups[0]
    taken = first["params"].pop(0)
    saved = optimizer.state_dict()
    assert len(saved["state"]) == 3
    assert saved["param_groups"][0]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    assert float(optimizer.state[taken]["step"]) == 1
    first["params"].append(taken)
    optimizer.step()
    assert first["param_names"] == ["0.bias", "1.weight", "1.bias", "0.weight"]
    assert float(optimizer.state[taken]["step"]) == 2


def rank_of(preset):
    """Settings that make a preset project the small matrices of a test."""
    refreshes = "update_proj_gap" in inspect.signature(preset).parameters
    return {"rank": RANK} if refreshes else {}


def test_groups_without_our_settings_get_the_defaults():
    optimizer = GaLoreAdamW([a_matrix()], rank=2, update_proj_gap=7)
    new = a_matrix()
    optimizer.param_groups = [*optimizer.param_groups, {"params": [new], "lr": 0.5}]
    new.grad = torch.randn_like(new)
    optimizer.step()
    group = optimizer.param_groups[1]
    assert (group["lr"], group["rank"], group["update_proj_gap"]) == (0.5, 2, 7)


def test_bad_settings_of_assigned_groups_are_refused_before_anything_moves():
    params = [a_matrix(), a_matrix()]
    optimizer = GaLoreAdamW(params[:1], rank=2)
    optimizer.param_groups.append({"params": params[1:], "update_proj_gap": 0})
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="update_proj_gap=0 in group 1"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("amsgrad", True, "amsgrad is not offered"),
        ("updat_proj_gap", 3, "did you mean 'update_proj_gap'"),
        ("density", 0.5, "use 'rank'"),
        ("proj_type", "std", "both 'side' and 'proj_type' in group 0"),
    ],
)
def test_keys_that_are_set_later_are_read_as_those_of_new_groups(key, value, message):
    param = a_matrix()
    optimizer = GaLoreAdamW([param], rank=2)
    optimizer.param_groups = [{**optimizer.param_groups[0], key: value}]
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state


def test_groups_in_odd_forms():
    param = a_matrix()
    optimizer = GaLoreAdamW([param], rank=2)
    optimizer.param_groups[0]["params"] = (each for each in [param])
    optimizer.param_groups[0]["betas"] = np.array([0.9, 0.95])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.param_groups[0]["params"] == [param]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    optimizer.param_groups.append({"lr": 1e-3})
    with pytest.raises(ValueError, match="group 1 has no 'params'"):
        optimizer.step()
    optimizer.param_groups.clear()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert "projects none" in optimizer.summary()


def in_turn(params):
    return (each for each in params)


@pytest.mark.parametrize("form", [in_turn, tuple, lambda params: params[0]])
@pytest.mark.parametrize("alone", [False, True])
def test_groups_in_odd_forms_between_steps(form, alone):
    """`alone` is in the middle of a step, parameter by parameter."""
    params = [a_matrix(), a_matrix(9, 7)]
    optimizer = GaLoreAdamW(params, rank=2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step_param(params[1]) if alone else optimizer.step()
    optimizer.param_groups[0]["params"] = form(params)
    optimizer.zero_grad()
    for param in params:
        assert param.grad is None or form not in (in_turn, tuple)
        param.grad = torch.ones_like(param)
    optimizer.step_param(params[0]) if alone else optimizer.step()
    kept = params[:1] if form not in (in_turn, tuple) else params
    assert isinstance(optimizer.param_groups[0]["params"], list)
    assert all(map(operator.is_, optimizer.param_groups[0]["params"], kept))
    assert optimizer.state[params[0]]["step"] == 2 - alone
    del optimizer.param_groups[0]["params"]
    with pytest.raises(ValueError, match="group 0 has no 'params'"):
        optimizer.step()


@pytest.mark.parametrize(("before", "after", "width"), [(1, 1.0, 6), (1.0, 1, 1)])
def test_one_column_and_a_share_of_one_are_two_ranks(before, after, width):
    param = a_matrix()
    optimizer = LDAdamW([param], rank=before, min_dim=1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    weight = param.detach().clone()
    optimizer.param_groups[0]["rank"] = after
    with pytest.raises(RuntimeError, match="its group's parts, rank"):
        optimizer.step()
    assert torch.equal(param, weight)
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].shape == (8, width)


def test_a_bool_is_no_rank_where_one_column_was():
    param = a_matrix()
    optimizer = GaLoreAdamW([param], rank=1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = True
    with pytest.raises(ValueError, match="rank=True in group 0"):
        optimizer.step()


def test_names_by_place_are_never_given_twice():
    optimizer = GaLoreAdamW([{"params": [("a", a_matrix())]}], rank=2)
    optimizer.add_param_group({"params": [a_matrix()]})
    optimizer.add_param_group({"params": [a_matrix()]})
    optimizer.param_groups.pop(1)
    optimizer.add_param_group({"params": [a_matrix()]})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(set(names)) == 3


def test_one_vector_in_place_of_matrices_is_a_flat_piece_and_a_new_bias_is_none():
    layer, new = nn.Linear(6, 8), nn.Linear(6, 8)
    optimizer = GaLoreAdamW(layer.parameters(), rank=2)
    optimizer.param_groups[0]["params"] = list(new.parameters())
    for param in new.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    flat = nn.Parameter(torch.cat([param.detach().flatten() for param in new.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"flat piece of a matrix of shape \(8, 6\)"):
        optimizer.step()


@pytest.mark.parametrize("first_named", [True, False])
def test_groups_with_and_without_names_go_together(first_named):
    old, new = nn.Linear(6, 8), nn.Linear(5, 8)
    named, bare = (
        (lambda layer: list(layer.named_parameters())),
        lambda layer: list(layer.parameters()),
    )
    build, add = (named, bare) if first_named else (bare, named)
    optimizer = GaLoreAdamW([{"params": build(old)}], rank=2)
    optimizer.add_param_group({"params": add(new)})
    place = 1 if first_named else 0
    made = optimizer.param_groups[place]["param_names"]
    assert made == [f"group{place}.0", f"group{place}.1"]
    assert optimizer.param_groups[1 - place]["param_names"] == ["weight", "bias"]


def test_a_group_that_is_refused_leaves_no_names():
    layer = nn.Linear(6, 8)
    optimizer = GaLoreAdamW(layer.parameters(), rank=2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": list(layer.named_parameters())})
    assert len(optimizer.param_groups) == 1
    assert "param_names" not in optimizer.param_groups[0]


def test_refreshes_are_spread_over_the_optimizer():
    """As with layer decay, where each layer has a group of its own."""
    params = [a_matrix() for _ in range(9)]
    groups = [{"params": [param], "lr": 0.1 * 0.9**k} for k, param in enumerate(params)]
    groups[3]["stagger"] = False
    groups[5]["update_proj_gap"] = 16
    groups[7]["rank"] = None
    optimizer = GaLoreAdamW(groups, rank=2, update_proj_gap=7, lr=0.1)
    sites = [entries[0].site for _, _, entries in optimizer._session.prepared().groups]
    assert [site and site.phase for site in sites] == [0, 1, 2, 0, 3, 9, 5, None, 6]


def test_each_matrix_is_refreshed_in_its_phase():
    params = [a_matrix() for _ in range(3)]
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=6)
    moved = [[] for _ in params]
    for step in range(14):
        before = [optimizer.state[param].get("basis", torch.zeros(())).clone() for param in params]
        for place, param in enumerate(params):
            param.grad = gradient(param, step, place)
        optimizer.step()
        for param, old, steps in zip(params, before, moved, strict=True):
            if not torch.equal(optimizer.state[param]["basis"], old):
                steps.append(step)
    assert moved == [[0, 6, 12], [0, 2, 8], [0, 4, 10]]


@pytest.mark.parametrize("preset", PRESETS)
def test_keywords_of_torch_are_taken(preset):
    def build(**more):
        return preset([a_matrix()], **rank_of(preset), **more)

    torchs = {"fused": None, "foreach": None, "amsgrad": False, "differentiable": False}
    plain = build().param_groups[0].keys()
    assert build(**torchs).param_groups[0].keys() == plain
    assert build(foreach=False, fused=False).param_groups[0]["fused"] is False
    for bad in ("amsgrad", "differentiable"):
        with pytest.raises(ValueError, match=f"{bad}=True"):
            build(**{bad: True})
    with pytest.raises(ValueError, match="foreach=True and fused=True"):
        build(foreach=True, fused=True)


def test_keys_that_only_contain_a_setting_are_kept_and_misspelt_ones_refused():
    extra = {"weight_decay_scale": 1, "init_weight_decay": 0.1, "stage": 2, "lr_scale": 0.5,
             "base_lr": 1e-3, "min_lr": 0.0, "rank_of_layer": 3}  # fmt: skip
    group = GaLoreAdamW([{"params": [a_matrix()], "rank": 2, **extra}]).param_groups[0]
    assert {key: group[key] for key in extra} == extra
    with pytest.raises(ValueError, match="'wieght_decay' in group 0: did you mean 'weight_decay'"):
        GaLoreAdamW([{"params": [a_matrix()], "rank": 2, "wieght_decay": 0.1}])


@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_parameters_of_any_dtype_are_carried(preset):
    frozen = [
        nn.Parameter(torch.ones(64, 1, dtype=torch.uint8), requires_grad=False),
        nn.Parameter(torch.tensor(5), requires_grad=False),
        nn.Parameter(torch.ones(9, 4, dtype=torch.complex64), requires_grad=False),
    ]
    before = [param.detach().clone() for param in frozen]
    trained = a_matrix()
    optimizer = preset([frozen[0], trained, *frozen[1:]], **rank_of(preset))
    trained.grad = torch.randn_like(trained)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert float(optimizer.state[trained]["step"]) == 2
    assert all(map(torch.equal, frozen, before))
    assert "tensors" in optimizer.summary()


@pytest.mark.parametrize("shape", [(8, 6), (7,)])
def test_a_schedule_below_zero_does_as_in_torch(shape):
    value, up = torch.randn(shape), {"weight_decay": 0.0}
    rank = {"rank": 2} if len(shape) > 1 else {"rank": None}
    down = nn.Parameter(value.clone())
    ours = LowRank([{"params": [a_matrix()], "rank": 2}, {"params": [down], **rank}], lr=0.1, **up)
    climbs = nn.Parameter(value.clone())
    other = LowRank(
        [{"params": [a_matrix()], "rank": 2}, {"params": [climbs], **rank}], lr=0.1, maximize=True,
        **up,
    )  # fmt: skip
    for group in ours.param_groups:
        group["lr"] = -0.1
    for _ in range(3):
        down.grad = torch.randn(shape)
        climbs.grad = -down.grad if len(shape) == 1 else down.grad.clone()
        ours.step()
        other.step()
    if len(shape) > 1:  # the sign of a projected step is that of lr, whatever the subspace
        assert torch.equal(down, climbs)
    theirs = nn.Parameter(value.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.1, **up)
    adamw.param_groups[0]["lr"] = 0.0
    theirs.grad = torch.ones(shape)
    adamw.step()
    assert torch.equal(theirs, value)


def test_zero_and_negative_rates_of_plain_parameters_are_those_of_torch():
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizers = [
        GaLoreAdamW(
            [{"params": [ours], "rank": None}, {"params": [a_matrix()], "rank": 2}], lr=0.1
        ),
        torch.optim.AdamW([theirs], lr=0.1),
    ]
    for rate in (0.1, 0.0, -0.05, 0.2):
        grad = torch.randn(5)
        for optimizer, param in zip(optimizers, (ours, theirs), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            param.grad = grad.clone()
            optimizer.step()
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"lr=-0\.1"):
        GaLoreAdamW([a_matrix()], rank=2, lr=-0.1)


PARTS_TRIED = [
    ("projector", Power(1, plain=True)),
    ("projector", Blocks("mirror")),
    ("projector", DCT("l2")),
    ("rule", Muon(momentum=0.5, nesterov=False)),
    ("rule", Lion()),
    ("residual", NormScaled(limiter=float("inf"))),
    ("residual", NormScaled(limiter=None, form="paper")),
    ("residual", Compensated(0.3, limiter=1.5)),
    ("residual", StateFree("sgd", 1e-7)),
    ("feed", ErrorFeedback(keep=0.9, dtype="4bit")),
]


@pytest.mark.parametrize(("key", "part"), PARTS_TRIED, ids=lambda value: str(value))
def test_parts_stand_in_groups_as_plain_data_and_come_back_equal(key, part):
    text = GaLoreAdamW([a_matrix()], rank=2).param_groups[0]
    assert part_of(key, part) == part
    group = {**text}
    group[key] = part
    optimizer = LowRank([{"params": [a_matrix()], "rank": 0.5, key: part, **fitting(part)}])
    stored = optimizer.param_groups[0][key]
    assert isinstance(stored, str)
    assert with_numbers(part_of(key, stored), optimizer.param_groups[0]) == part
    file = io.BytesIO()
    torch.save([{**group, "params": []} for group in optimizer.param_groups], file)
    file.seek(0)
    assert torch.load(file, weights_only=True)[0][key] == stored


def fitting(part):
    """Settings that a part needs beside it."""
    if isinstance(part, Blocks):
        return {"on_refresh": "reset"}
    return {"rule": "adam"} if isinstance(part, ErrorFeedback) else {}


@given(st.floats(0.01, 1), st.floats(0.01, 0.5), st.floats(0.5, 1))
def test_auto_ranks_stand_in_groups_as_plain_data(share, least, most):
    auto = AutoRank(share, least, most)
    optimizer = GaLoreAdamW([a_matrix()], rank=auto)
    assert optimizer.param_groups[0]["rank"] == "auto"
    assert rank_asked(optimizer.param_groups[0]) == auto
    again = GaLoreAdamW(optimizer.param_groups)
    assert rank_asked(again.param_groups[0]) == auto


def test_a_part_of_the_users_own_stays_the_object_that_it_is():
    class Mine(SVD):
        pass

    class Power(SVD):  # a name that one of ours has
        pass

    for part in (Mine(), Power()):
        optimizer = GaLoreAdamW([a_matrix()], rank=2, projector=part)
        assert optimizer.param_groups[0]["projector"] is part


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("residual", "NormScaled(limiter=0.5)", "limiter must be"),
        ("residual", "NormScaled(limit=2)", "limit"),
        ("projector", "Power(iterations=__import__('os'))", "one of 'svd'"),
        ("projector", "print('x')", "one of 'svd'"),
        ("rule", "Adam(", "one of 'adam'"),
        ("rank", "AutoRank(share=2)", "None, an int"),
    ],
)
def test_texts_that_stand_for_nothing_are_refused(key, text, message):
    with pytest.raises(ValueError, match=message):
        LowRank([{"params": [a_matrix()], "rank": 2, key: text}])


def test_every_registered_part_has_a_text():
    for key, registry in PARTS.items():
        for part in registry.values():
            assert part_of(key, repr(part)) == part
