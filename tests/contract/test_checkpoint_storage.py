"""A checkpoint's moments come in the storage that the new optimizer was built with."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from helpers.cases import CASES, GAP, RANK, Model, gradient, train
from lowrank_optim import FiraAdamW, GaLoreAdamW, MuonW, TrionW
from lowrank_optim.functional import (
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_squares,
    quantize_blockwise,
    quantize_squares,
)
from lowrank_optim.parts.checks import SettingError

DTYPES = {None: torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
STORAGES = (*DTYPES, "8bit")
ROUTES = [(a, b) for a in STORAGES for b in STORAGES if a != b]
METHODS = {
    "galore": lambda p, **s: GaLoreAdamW(p, rank=RANK, projector="power", **s),
    "fira-left": lambda p, **s: FiraAdamW(p, rank=RANK, side="left", **s),
    "muon": MuonW,
}


class Net(nn.Module):
    """Matrices, tall and wide, a stack, and plain parameters on both sides of 4096 elements."""

    def __init__(self):
        super().__init__()
        shapes = {
            "tall": (13, 7),
            "wide": (5, 11),
            "stack": (3, 8, 5),
            "bias": (9,),
            "thin": (2100, 2),
        }
        torch.manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def step(model, optimizer, number=0):
    for position, param in enumerate(model.parameters()):
        param.grad = gradient(param, number, position)
    optimizer.step()


def began(make, storage):
    model = Net()
    optimizer = make(model.parameters(), state_dtype=storage)
    for number in range(3):
        step(model, optimizer, number)
    return model, optimizer


def dense(state, slot):
    """Return a moment as a plain tensor, and whether it was one."""
    if slot in state:
        return state[slot], True
    codes, scale = state[f"{slot}.codes"], state[f"{slot}.scale"]
    flat = codes if codes.ndim == scale.ndim else codes.flatten(1)
    read = dequantize_squares if slot.endswith("_sq") else dequantize_blockwise
    return read(flat, scale).view(codes.shape), False


def load(optimizer, saved, match="as asked here state_dtype"):
    with pytest.warns(UserWarning, match=match):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("there", "here"), ROUTES)
@pytest.mark.parametrize("method", METHODS)
def test_moments_and_bases_are_converted(method, there, here):
    model, optimizer = began(METHODS[method], there)
    saved = copy.deepcopy(optimizer.state_dict())
    other_model, other = copy.deepcopy(model), None
    other = METHODS[method](other_model.parameters(), state_dtype=here)
    load(other, saved)
    assert other.param_groups[0]["state_dtype"] == here
    _, native = began(METHODS[method], here)
    for state, theirs, own in zip(
        saved["state"].values(), other.state.values(), native.state.values(), strict=True
    ):
        assert {k: getattr(v, "dtype", None) for k, v in theirs.items()} == {
            k: getattr(v, "dtype", None) for k, v in own.items()
        }
        for slot in (slot for slot in ("exp_avg", "exp_avg_sq") if any(
            key.partition(".")[0] == slot for key in state
        )):  # fmt: skip
            value, _ = dense(state, slot)
            if slot in theirs:
                assert torch.equal(theirs[slot], value.to(theirs[slot].dtype))
                assert theirs[slot].stride() == own[slot].stride()
                continue
            rows = value if theirs[f"{slot}.scale"].ndim == value.ndim else value.flatten(1)
            write = quantize_squares if slot == "exp_avg_sq" else quantize_blockwise
            codes, scale = write(rows.float())
            assert torch.equal(theirs[f"{slot}.codes"], codes.view(value.shape))
            assert torch.equal(theirs[f"{slot}.scale"], scale)
        if "basis" in state:
            assert torch.equal(theirs["basis"], state["basis"].to(theirs["basis"].dtype))
    step(other_model, other, 3)
    assert all(bool(param.isfinite().all()) for param in other_model.parameters())


def test_wider_and_back_is_the_same_to_the_bit():
    model, optimizer = began(METHODS["galore"], "bfloat16")
    wide = METHODS["galore"](model.parameters(), state_dtype="float64")
    back = METHODS["galore"](model.parameters(), state_dtype="bfloat16")
    load(wide, optimizer.state_dict())
    load(back, wide.state_dict())
    for left, right in zip(optimizer.state.values(), back.state.values(), strict=True):
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(right[k])) for k, v in left.items()
        )


@pytest.mark.parametrize("here", [None, "bfloat16", "8bit", "4bit"])
@pytest.mark.parametrize("there", [None, "bfloat16", "8bit", "4bit"])
def test_what_a_feed_carries_is_converted(there, here):
    if there == here:
        return
    model = Net()
    make = lambda dtype: TrionW(model.parameters(), rank=RANK, momentum_dtype=dtype)  # noqa: E731
    optimizer, other = make(there), make(here)
    step(model, optimizer)
    load(other, optimizer.state_dict(), "as asked here feed ErrorFeedback")
    before, after = optimizer.state[model.tall], other.state[model.tall]
    values = [
        dequantize_4bit(s["error.packed"], s["error.scale"])[..., :7]
        if "error.packed" in s else dense(s, "error")[0].float() for s in (before, after)
    ]  # fmt: skip
    largest = values[0].abs().max()
    error = {None: 0, "bfloat16": 2**-8, "8bit": 0.04, "4bit": 1 / 14}[here]
    assert (values[0] - values[1]).abs().max() <= error * largest * (1 + 1e-5)
    step(model, other, 1)


def test_a_matrix_that_sits_out_is_converted_too():
    case = next(case for case in CASES if case.name == "frugal-blocks")
    model = Model()
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(GAP + 1))
    widths = {optimizer.state[p]["exp_avg"].shape[-1] == 0 for p in (model.tall, model.wide)}
    other = case.build(model.parameters(), state_dtype="8bit")
    load(other, optimizer.state_dict())
    assert {
        other.state[p]["exp_avg.codes"].shape[-1] == 0 for p in (model.tall, model.wide)
    } == widths
    train(model, other, range(GAP + 1, 3 * GAP))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_halves_that_a_trainer_made_are_cast_up(case, half):
    model = Model()
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(GAP + 1))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            if torch.is_tensor(value) and value.dtype == torch.float32:
                state[key] = value.to(half)
    other = case.build(model.parameters())
    other.load_state_dict(saved)
    for left, right, given in zip(
        optimizer.state.values(), other.state.values(), saved["state"].values(), strict=True
    ):
        for key, value in left.items():
            if torch.is_tensor(value):
                assert right[key].dtype == value.dtype
                assert torch.equal(right[key], given[key].to(value.dtype))
    train(model, other, range(GAP + 1, GAP + 2))


def test_keys_of_a_wrapper_are_kept_as_they_are():
    model = Model(torch.bfloat16)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(1))
    ema = torch.randn(13, 7, dtype=torch.float64)
    mine = {"slow": ema, "seen": 3, "nested": {"a": [torch.ones(2), "x"], "b": (None, 2.5)}}
    optimizer.state[model.tall].update(mine)
    saved = optimizer.state_dict()
    other = GaLoreAdamW(model.parameters(), rank=RANK)
    other.load_state_dict(saved)
    state = other.state[model.tall]
    assert torch.equal(state["slow"], ema)
    assert state["slow"].dtype == torch.float64
    assert state["seen"] == 3
    assert state["nested"]["b"] == (None, 2.5)
    assert torch.equal(state["nested"]["a"][0], torch.ones(2))
    state["slow"].zero_()
    state["nested"]["a"][0].zero_()
    assert torch.equal(ema, saved["state"][0]["slow"])
    assert saved["state"][0]["nested"]["a"][0].all()
    train(model, other, range(1, 2))
    assert "slow" in other.state_dict()["state"][0]


@pytest.mark.parametrize(
    "key", ["residual_norm", "age", "index", "error", "row_sq", "exp_avg.codes"]
)
def test_a_key_of_another_method_is_an_error(key):
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0][key] = torch.ones(())
    with pytest.raises(SettingError, match=f"only the checkpoint has '{key}' for parameter 0"):
        GaLoreAdamW(model.parameters(), rank=RANK).load_state_dict(saved)


COUNT_FORMS = [float, int, lambda x: x.double(), lambda x: x.to(torch.int64)]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("frugal", "apollo", "muon")], ids=str
)
@pytest.mark.parametrize("form", COUNT_FORMS)
def test_counts_are_read_in_any_form(case, form):
    model = Model()
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(GAP + 1))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key in {"step", "age"} & set(state):
            state[key] = form(state[key])
        if "drawn" in state:
            state["drawn"] = torch.tensor(state["drawn"])
    other = case.build(model.parameters())
    other.load_state_dict(saved)
    for left, right in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key in {"step", "age", "drawn"} & set(left):
            assert type(left[key]) is type(right[key])
            assert left[key] == right[key]
            assert getattr(left[key], "dtype", None) == getattr(right[key], "dtype", None)


TOLD = {
    "none": ({}, {}, None),
    "gap": ({"update_proj_gap": 7}, {}, r"from the checkpoint update_proj_gap 7 \(here 200\)$"),
    "storage": (
        {"seed": 3}, {"state_dtype": torch.bfloat16},
        r"from the checkpoint seed 3 \(here 0\); as asked here state_dtype bfloat16 "
        r"\(in the checkpoint None\)$",
    ),
    "rates": ({"lr": 0.1, "betas": (0.8, 0.9)}, {}, r"lr 0\.1 \(here 0\.001\), betas \(0\.8,"),
    "machine": ({"impl": "eager"}, {"foreach": True}, None),
    "limiter": ({"limiter": 1.01}, {"limiter": 1.5}, r"checkpoint limiter 1\.01 \(here 1\.5"),
}  # fmt: skip


@pytest.mark.parametrize("why", TOLD)
def test_one_warning_says_which_settings_are_whose(why):
    there, here, message = TOLD[why]
    model = Model()
    foreach = {"foreach": True} if here.pop("foreach", False) else {}
    optimizer = FiraAdamW(model.parameters(), rank=RANK, **there)
    other = FiraAdamW([{"params": list(model.parameters()), **foreach}], rank=RANK, **here)
    saved = optimizer.state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(saved)
    assert len(caught) == (message is not None)
    if message is not None:
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match=message):
            FiraAdamW(model.parameters(), rank=RANK, **here).load_state_dict(saved)


def test_what_a_schedule_has_done_is_no_news():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK, lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    train(model, optimizer, range(2))
    schedule.step()
    other = GaLoreAdamW(model.parameters(), rank=RANK, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1


def test_texts_of_parts_of_other_versions_are_no_news():
    model = Model()
    optimizer = FiraAdamW(model.parameters(), rank=RANK)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["residual"] = "NormScaled(limiter=1.01, once=3)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
