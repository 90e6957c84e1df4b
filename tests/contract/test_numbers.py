"""Numbers of parts in groups: every number of every method, from what the parts declare."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.cases import PRESETS, assert_same, gradient
from helpers.places import TESTS
from lowrank_optim import (
    RACS,
    AutoRank,
    Compensated,
    CompensatedAdamW,
    ErrorFeedback,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    Lion,
    LowRank,
    LowRankAdamW,
    Muon,
    MuonW,
    NormScaled,
    SettingError,
    StateFree,
    TrionW,
    param_groups,
)
from lowrank_optim.parts.numbers import Number
from lowrank_optim.settings.plans import numbers_in, plan_of
from lowrank_optim.settings.values import NUMBERS

SHAPES = ((13, 7), (5, 11), (3, 8, 5), (11,))
GAP = 3
TRIED: dict[type, tuple[Any, ...]] = {float: (0.45, 1.35), int: (2,), bool: (True, False)}
"""Values to try, by type: the first that is allowed and another than the default."""
CALLED = {"keep": "momentum"}
"""What constructors call a number that has another name in groups."""
WRONG = ("a text", float("nan"), -1, torch.ones(2))
"""Values that no number may have."""


def params_of() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]


def build(preset: type[LowRank], own: Mapping[str, Any] | None = None, **more: Any) -> LowRank:
    """Return an optimizer of one group, which has settings of its own."""
    takes = inspect.signature(preset).parameters
    size = {"rank": 3, "update_proj_gap": GAP} if "update_proj_gap" in takes else {}
    groups = [{"params": params_of(), **(own or {})}]
    return preset(groups, **{"lr": 1e-2, "min_dim": 1, **size, **more})


def auto(own: Mapping[str, Any] | None = None, **rank: float) -> LowRank:
    return build(GaLoreAdamW, own, rank=AutoRank(**rank) if rank else "auto")


def train(optimizer: LowRank, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for position, param in enumerate(group["params"]):
                param.grad = gradient(param, step, position)
        optimizer.step()


def held(optimizer: LowRank) -> dict[str, torch.Tensor]:
    """Weights and states, by name."""
    found = {}
    for position, param in enumerate(optimizer.param_groups[0]["params"]):
        found[f"{position}"] = param.detach().clone()
        for key, value in optimizer.state[param].items():
            found[f"{position}.{key}"] = torch.as_tensor(value).clone()
    return found


def differ(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() != right.keys() or any(not torch.equal(left[k], right[k]) for k in left)


def other_value(number: Number, default: Any) -> Any:
    return next(x for x in TRIED[number.kind] if number.good(x) and x != default)


METHODS = {
    **{preset.__name__: lambda own=None, preset=preset: build(preset, own) for preset in PRESETS},
    "rank": auto,
    "low rank": lambda own=None: auto(own, share=0.05),
}
SHADOWED = {("rank", "rank_least"), ("low rank", "rank_share"), ("low rank", "rank_most")}
"""Changes that change no rank: the least is chosen, or never."""
EVERY = [
    (name, key) for name, make in METHODS.items() for key in numbers_in(make().param_groups[0])
]


def changed(name: str, key: str) -> tuple[Any, Any]:
    """Return the default of a number and another value."""
    group = METHODS[name]().param_groups[0]
    return group[key], other_value(numbers_in(group)[key], group[key])


def test_every_declared_number_is_tried():
    assert {key for _, key in EVERY} == set(NUMBERS)


def constructed() -> list[tuple[type[LowRank], str]]:
    found = []
    for preset in PRESETS:
        takes = inspect.signature(preset).parameters
        for key in numbers_in(build(preset).param_groups[0]):
            found += [(preset, name) for name in {key, CALLED.get(key, key)} if name in takes]
    return found


@pytest.mark.parametrize(("preset", "name"), constructed())
def test_a_number_in_a_group_is_that_of_the_constructor(preset, name):
    numbers = numbers_in(build(preset).param_groups[0])
    key = name if name in numbers else next(key for key in CALLED if CALLED[key] == name)
    value = other_value(numbers[key], build(preset).param_groups[0][key])
    plain, ours, theirs = (
        build(preset),
        build(preset, {name: value}),
        build(preset, **{name: value}),
    )
    assert ours.param_groups[0][key] == theirs.param_groups[0][key] == value
    for optimizer in (plain, ours, theirs):
        train(optimizer, range(GAP + 2))
    assert_same(held(ours), held(theirs))
    assert differ(held(plain), held(ours))


def test_no_keyword_of_a_constructor_is_ignored_in_a_group():
    """It is a setting, a number of its parts, or refused."""
    shared = {"self", "params", "common"}
    for preset in PRESETS:
        group = build(preset).param_groups[0]
        for name in inspect.signature(preset).parameters.keys() - shared - group.keys():
            if name not in CALLED.values():
                with pytest.raises(SettingError, match=f"{name}.*is not read"):
                    build(preset, {name: 0.5})


@pytest.mark.parametrize(("preset", "name"), [(RACS, "limiter"), (FiraAdamW, "limiter")])
def test_no_limiter_in_a_group_is_none_of_the_constructor(preset, name):
    ours, theirs = build(preset, {name: None}), build(preset, **{name: None})
    for optimizer in (ours, theirs):
        train(optimizer, range(GAP + 2))
    assert_same(held(ours), held(theirs))


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_change_acts_from_the_next_step_on(name, key):
    """As in an optimizer that is built with it and goes on from there."""
    _, value = changed(name, key)
    scheduled, built, plain = METHODS[name](), METHODS[name]({key: value}), METHODS[name]()
    for optimizer in (scheduled, plain):
        train(optimizer, range(2))
    state = copy.deepcopy(scheduled.state_dict())
    for group in state["param_groups"]:
        group[key] = value
    for own, other in zip(
        built.param_groups[0]["params"], scheduled.param_groups[0]["params"], strict=True
    ):
        own.data.copy_(other.data)
    built.load_state_dict(state)
    scheduled.param_groups[0][key] = value
    for optimizer in (scheduled, built, plain):
        train(optimizer, range(2, 2 * GAP + 2))
    assert scheduled.param_groups[0][key] == value
    assert_same(held(scheduled), held(built))
    assert differ(held(plain), held(scheduled)) or (name, key) in SHADOWED


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_checkpoint_restores_a_number_and_says_so(name, key):
    default, value = changed(name, key)
    optimizer = METHODS[name]({key: value})
    train(optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0][key] == value
    other = METHODS[name]()
    with pytest.warns(
        UserWarning, match=rf"from the checkpoint.* {key} {value} \(here {default}\)"
    ):
        other.load_state_dict(saved)
    assert other.param_groups[0][key] == value
    scheduled = METHODS[name]()
    scheduled.param_groups[0]["initial_lr"] = 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled.load_state_dict(saved)
    assert scheduled.param_groups[0][key] == value


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_number_out_of_its_range_is_refused_by_name(name, key):
    optimizer = METHODS[name]()
    train(optimizer, range(1))
    before, default = held(optimizer), optimizer.param_groups[0][key]
    for value in WRONG:
        with pytest.raises(SettingError, match=f"{key}=.* in group 0: {key} must be"):
            METHODS[name]({key: value})
        optimizer.param_groups[0][key] = value
        with pytest.raises(SettingError, match=f"{key}=.* in group 0: {key} must be"):
            train(optimizer, range(1, 2))
        assert not differ(before, held(optimizer))
    optimizer.param_groups[0][key] = default
    train(optimizer, range(1, 2))


@pytest.mark.parametrize("name", METHODS)
def test_a_number_that_nothing_reads_is_refused(name):
    for key in NUMBERS.keys() - numbers_in(METHODS[name]().param_groups[0]).keys():
        if key in CALLED.values() and name == "TrionW":
            continue
        with pytest.raises(SettingError, match=rf"'{key}' in group 0 is not read.*is a number of "):
            METHODS[name]({key: 0.5})
        optimizer = METHODS[name]()
        optimizer.param_groups[0][key] = 0.5
        with pytest.raises(SettingError, match=f"'{key}' in group 0 is not read"):
            train(optimizer, range(1))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"limiter": 1.02}, r"residual=NormScaled\(...\) and residual=GradScaled"),
        ({"momentum": 0.5}, r"rule=Muon\(...\) and rule=NorMuon\(...\)"),
        ({"rank_share": 0.5}, 'rank="auto"'),
        ({"beta": 0.5}, "did you mean 'betas'"),
        ({"length": "dion"}, "rule=Muon"),
        ({"momentum_dtype": "8bit"}, "feed=ErrorFeedback"),
        ({"process_group": None}, "the whole optimizer"),
    ],
)
def test_the_message_names_the_way_out(own, said):
    with pytest.raises(SettingError, match=f"'{next(iter(own))}' in group 0.*{said}"):
        build(GaLoreAdamW, own)


def test_what_is_plain_reads_no_number_of_a_projection():
    with pytest.raises(SettingError, match="'momentum' in group 0 is not read"):
        MuonW([{"params": params_of(), "rank": None, "momentum": 0.5}, {"params": params_of()}])
    rest, matrices = MuonW(
        [{"params": params_of(), "rank": None}, {"params": params_of()}]
    ).param_groups
    assert "momentum" not in rest
    assert matrices["momentum"] == 0.95


def test_constructors_say_where_a_number_belongs():
    with pytest.raises(TypeError, match=r"'momentum': put it into a group that has rule=Muon"):
        build(GaLoreAdamW, momentum=0.5)


PARTS_WITH_NUMBERS = [
    (FiraAdamW, "residual", NormScaled(1.02, "paper"), "NormScaled(form='paper')",
     {"limiter": 1.02}),
    (
        CompensatedAdamW, "residual", Compensated(0.7, 0.8, 1.3), "Compensated()",
        {"compensation": 0.7, "beta": 0.8, "limiter": 1.3},
    ),
    (LowRankAdamW, "residual", StateFree("sgd", 0.2), "StateFree(form='sgd')",
     {"state_free_scale": 0.2}),
    (MuonW, "rule", Muon("dion", 3, 0.5, False), "Muon(length='dion')",
     {"iterations": 3, "momentum": 0.5, "nesterov": False}),
    (TrionW, "feed", ErrorFeedback(0.4, "8bit"), "ErrorFeedback(dtype='8bit')", {"keep": 0.4}),
    (GaLoreAdamW, "rank", AutoRank(0.7, 0.2, 0.9), "auto",
     {"rank_share": 0.7, "rank_least": 0.2, "rank_most": 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "key", "part", "text", "numbers"), PARTS_WITH_NUMBERS)
@pytest.mark.parametrize("form", ["object", "text", "later"])
def test_a_part_gives_its_numbers_to_its_group(preset, key, part, text, numbers, form):
    if form == "later":
        optimizer = build(preset)
        optimizer.param_groups[0][key] = part
        train(optimizer, range(1))
    else:
        optimizer = build(preset, {key: part if form == "object" else repr(part)})
    group = optimizer.param_groups[0]
    assert group[key] == text
    assert {name: group[name] for name in numbers} == numbers
    saved = optimizer.state_dict()["param_groups"][0]
    assert {name: saved[name] for name in (key, *numbers)} == {key: text, **numbers}


def test_a_part_without_a_limiter_gives_none_to_its_group():
    optimizer = build(FiraAdamW, {"residual": NormScaled(None)})
    assert optimizer.param_groups[0]["limiter"] is None
    train(optimizer, range(2))
    assert not [key for key in held(optimizer) if "norm" in key]


def test_a_number_and_a_part_that_says_another_are_refused():
    with pytest.raises(
        SettingError, match=r"limiter=1.05 in group 0.* says 1.02.*NormScaled\(form"
    ):
        build(FiraAdamW, {"limiter": 1.05, "residual": NormScaled(1.02)})
    group = build(FiraAdamW, {"limiter": 1.02, "residual": NormScaled(1.02)}).param_groups[0]
    assert group["limiter"] == 1.02
    optimizer = build(FiraAdamW)
    optimizer.param_groups[0].update(limiter=1.05, residual=NormScaled(1.02))
    with pytest.raises(SettingError, match=r"limiter=1\.05 in group 0"):
        train(optimizer, range(1))


def test_one_number_outranks_another():
    """The group's own, then that of a part there, of the constructor for one kind, of the class."""
    for own, wanted in [
        ({"limiter": 1.2}, 1.2),
        ({"residual": "NormScaled(form='paper')", "limiter": 1.2}, 1.2),
        ({"residual": NormScaled(1.3)}, 1.3),
        ({"residual": NormScaled()}, 1.01),
        ({"residual": "norm_scaled"}, 1.5),
        ({"residual": "NormScaled(form='paper')"}, 1.5),
        ({}, 1.5),
        ({"residual": "grad_scaled"}, 1.01),
    ]:
        assert build(FiraAdamW, own, limiter=1.5).param_groups[0]["limiter"] == wanted, own


@pytest.mark.parametrize(
    ("preset", "key", "other"),
    [(TrionW, "keep", "momentum"), (CompensatedAdamW, "compensation", "factor")],
)
def test_another_name_of_a_number_means_the_same(preset, key, other):
    optimizer = build(preset, {other: 0.3})
    assert optimizer.param_groups[0][key] == 0.3
    assert other not in optimizer.param_groups[0]
    optimizer.param_groups[0][other] = 0.6
    train(optimizer, range(1))
    assert optimizer.param_groups[0][key] == 0.6
    with pytest.raises(SettingError, match=f"both '{key}' and '{other}' in group 0"):
        build(preset, {key: 0.3, other: 0.3})


def test_momentum_beside_error_feedback_is_that_of_the_rule():
    parts = {"rule": "muon", "feed": "error_feedback", "projector": "power"}
    group = build(LowRank, {**parts, "momentum": 0.5}).param_groups[0]
    assert (group["momentum"], group["keep"]) == (0.5, 0.0)
    with pytest.raises(SettingError, match="'momentum' in group 0 is not read"):
        build(LDAdamW, {"momentum": 0.5})


OPTIONAL = [
    (name, key)
    for name, key in EVERY
    if key in plan_of(METHODS[name]().param_groups[0]).optional and name != "RACS"
]
"""Numbers whose being None or not decides what is kept; RACS keeps the norm without a limiter."""


@pytest.mark.parametrize(("name", "key"), OPTIONAL)
def test_a_number_that_is_none_or_not_decides_what_is_kept_and_is_named(name, key):
    number = METHODS[name]().param_groups[0][key]
    for start, later, message in (
        (number, None, rf"' does not go with {key}=None in the state of .* cannot change once"),
        (None, number, rf"there is no '\w+', which goes with {key}={number}, in the state of"),
    ):
        optimizer = METHODS[name]({key: start})
        train(optimizer, range(2))
        before = held(optimizer)
        optimizer.param_groups[0][key] = later
        with pytest.raises(RuntimeError, match=message):
            train(optimizer, range(2, 3))
        assert not differ(before, held(optimizer))
        optimizer.param_groups[0][key] = start
        train(optimizer, range(2, 3))


def test_a_checkpoint_without_a_limiter_does_not_go_with_one():
    for here, there in ((1.5, None), (None, 1.5)):
        saved = build(FiraAdamW, {"limiter": there}).state_dict()
        with pytest.raises(
            SettingError, match=f"made with limiter={there} in group 0.* has {here}"
        ):
            build(FiraAdamW, {"limiter": here}).load_state_dict(saved)


def test_numbers_of_a_part_that_is_taken_out_go_with_it():
    optimizer = build(FiraAdamW)
    optimizer.param_groups[0]["residual"] = "drop"
    train(optimizer, range(2))
    assert "limiter" not in optimizer.param_groups[0]
    optimizer = build(FiraAdamW)
    optimizer.param_groups[0].update(residual="drop", limiter=1.2)
    with pytest.raises(SettingError, match="'limiter' in group 0 is not read"):
        train(optimizer, range(1))


def test_groups_from_outside_get_their_numbers():
    optimizer = build(MuonW, momentum=0.7)
    params = optimizer.param_groups[0]["params"]
    racs = dict(build(RACS).param_groups[0])
    halves = [{"params": params[:2], "momentum": 0.3}, {"params": params[2:]}]
    optimizer.param_groups = [*halves, racs]
    saved = optimizer.state_dict()["param_groups"]
    train(optimizer, range(1))
    for groups in (saved, optimizer.param_groups):
        assert [group.get("momentum") for group in groups] == [0.3, 0.7, None]
        assert groups[2]["beta"] == 0.9


def test_groups_of_one_optimizer_build_another_and_pickle():
    first = build(FiraAdamW, limiter=1.3)
    first.param_groups[0]["limiter"] = 1.4
    train(first, range(2))
    second = FiraAdamW(copy.deepcopy(first.param_groups), rank=3)
    assert second.param_groups[0]["limiter"] == 1.4
    for again in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        assert again.param_groups[0]["limiter"] == 1.4
        train(again, range(2, 4))
    train(first, range(2, 4))
    assert_same(held(again), held(first))


def test_a_setting_of_param_groups_may_be_a_number():
    model = nn.Linear(20, 40)
    groups = param_groups(model, rank="auto", min_dim=1, rank_share=0.6)
    assert GaLoreAdamW(groups).param_groups[0]["rank_share"] == 0.6
    muon = MuonW(param_groups(model, rank=1.0, min_dim=1, momentum=0.4))
    assert [group.get("momentum") for group in muon.param_groups] == [0.4, None]


@dataclass(frozen=True)
class Damped(Lion):
    """A rule of a user's own with a number; it steps what is not projected too."""

    damping: float = 0.5
    numbers: ClassVar[Mapping[str, Number]] = {"damping": Number.share("damping")}

    def direction(self, grad, moments, count, group):
        return super().direction(grad, moments, count, group).mul_(group["damping"])


class Bare(Lion):
    """One that declares nothing, and whose class says nothing of itself."""

    numbers = None

    def __getattribute__(self, name):
        if name == "numbers":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_part_of_a_users_own_may_declare_numbers():
    rule = Damped(damping=0.25)
    ours, theirs = build(LowRank, {"rule": rule}), build(LowRank, {"damping": 0.25}, rule=Damped())
    for optimizer in (ours, theirs):
        assert optimizer.param_groups[0]["damping"] == 0.25
        train(optimizer, range(2))
        optimizer.param_groups[0]["damping"] = 0.75
        train(optimizer, range(2, 4))
        assert optimizer.param_groups[0]["damping"] == 0.75
    assert ours.param_groups[0]["rule"] is rule
    assert_same(held(ours), held(theirs))
    again = pickle.loads(pickle.dumps(ours))
    again.param_groups[0]["rule"] = Damped(damping=0.25)
    train(again, range(4, 5))
    assert again.param_groups[0]["damping"] in (0.25, 0.75)
    ours.param_groups[0]["rule"] = Damped(damping=0.1)
    train(ours, range(4, 5))
    assert ours.param_groups[0]["damping"] == 0.1
    ours.param_groups[0]["damping"] = 2.0
    with pytest.raises(SettingError, match=r"damping=2\.0 in group 0: damping must be"):
        train(ours, range(5, 6))
    other = build(LowRank, {"rule": Damped(damping=0.9)})
    with pytest.warns(UserWarning, match=r"from the checkpoint damping 0.75 \(here 0.9\)$"):
        other.load_state_dict(theirs.state_dict())
    plain = LowRank(
        [{"params": params_of(), "rank": None}, {"params": params_of(), "rank": 3}], rule=rule
    )
    assert plain.param_groups[0]["damping"] == 0.25


def test_a_part_of_a_users_own_need_not_declare_any():
    optimizer = build(LowRank, {"rule": Bare()})
    train(optimizer, range(2))
    build(LowRank, {"rule": Bare()}).load_state_dict(optimizer.state_dict())


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.none(), st.floats(1, allow_nan=False)),
    st.floats(0, allow_infinity=False, allow_nan=False),
)
def test_numbers_come_back_as_they_were(beta, limiter, compensation):
    own = {"beta": beta, "limiter": limiter, "compensation": compensation}
    optimizer = build(CompensatedAdamW, {"residual": Compensated(compensation, beta, limiter)})
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in own} == own
    assert build(CompensatedAdamW, own).param_groups[0] | {"params": 0} == group | {"params": 0}
    old = copy.deepcopy(optimizer.state_dict())
    for key in own:
        del old["param_groups"][0][key]
    old["param_groups"][0].update(
        state_version=1, residual=repr(Compensated(compensation, beta, limiter))
    )
    other = build(CompensatedAdamW, {"limiter": limiter})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(old)
    assert {key: other.param_groups[0][key] for key in own} == own


FIRST = {
    "fira": (FiraAdamW, {"rank": 3}, {"limiter": 1.2}),
    "fira-free": (FiraAdamW, {"rank": 3, "limiter": None}, {"limiter": None}),
    "muon": (MuonW, {}, {"momentum": 0.8, "nesterov": False, "iterations": 5}),
    "trion": (TrionW, {"rank": 3}, {"keep": 0.7}),
    "ldadam": (LDAdamW, {"rank": 3}, {"rho": 0.5, "keep": 0.0}),
    "compensated": (
        CompensatedAdamW, {"rank": 3}, {"compensation": 0.7, "beta": 0.9, "limiter": 1.3}
    ),
    "racs": (RACS, {}, {"beta": 0.6, "iterations": 5, "limiter": 1.4}),
    "lowrank": (LowRankAdamW, {"rank": 3, "length": "published"}, {"state_free_scale": 0.3}),
    "auto": (
        GaLoreAdamW, {"rank": "auto", "min_dim": 1},
        {"rank_share": 0.7, "rank_least": 0.2, "rank_most": 0.9},
    ),
}  # fmt: skip
"""What is in the file, how it is loaded, and the numbers that stood in texts there."""


@pytest.mark.parametrize("name", FIRST)
def test_a_checkpoint_of_the_first_layout_goes_on(name):
    """Its states to the bit, its numbers as keys; the steps are those of one built with them."""
    saved = torch.load(TESTS / "data" / "version-1" / "methods.pt", weights_only=True)[name]
    preset, more, numbers = FIRST[name]
    runs = []
    for own in ({}, numbers):
        params = [nn.Parameter(value.clone()) for value in saved["model"].values()]
        optimizer = preset([{"params": params, **own}], lr=1e-2, **more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.load_state_dict(saved["optimizer"])
        told = " ".join(str(each.message) for each in caught)
        assert own == {} or not any(key in told for key in numbers)
        group = optimizer.param_groups[0]
        assert {key: group[key] for key in numbers} == numbers
        assert group["state_version"] == 2
        for position, param in enumerate(params):
            assert_same(
                tensors(optimizer.state[param]), tensors(saved["optimizer"]["state"][position])
            )
        for step in range(5, 9):
            for position, param in enumerate(params):
                param.grad = gradient(param, step, position)
            optimizer.step()
        runs.append(optimizer)
    assert_same(held(runs[0]), held(runs[1]))
    for param, later in zip(params, saved["later"].values(), strict=True):
        torch.testing.assert_close(param.detach(), later, rtol=1e-5, atol=1e-6)


def tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in state.items()}
