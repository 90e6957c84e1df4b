"""Saving and resuming: bit for bit, safely readable, and never silently wrong."""

from __future__ import annotations

import io

import pytest
import torch

from helpers.cases import CASES, GAP, RANK, Model, assert_same, train, weights
from helpers.pairwise import in_turn
from lowrank_optim import DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, LowRank

KEYS = {
    "galore": {"step", "exp_avg", "exp_avg_sq", "basis", "pending", "unset"},
    "galore-length": {
        "step", "exp_avg", "exp_avg_sq", "basis", "pending", "unset", "sample.exp_avg",
        "sample.exp_avg_sq",
    },
    "dct": {"step", "exp_avg", "exp_avg_sq", "index", "pending", "unset"},
    "fira": {"step", "exp_avg", "exp_avg_sq", "basis", "pending", "unset", "residual_norm"},
    "frugal": {"step", "exp_avg", "exp_avg_sq", "index", "age"},
    "frugal-blocks": {"step", "exp_avg", "exp_avg_sq", "age"},
    "apollo": {"step", "exp_avg", "exp_avg_sq", "drawn", "residual_norm"},
    "lion": {"step", "exp_avg", "basis", "pending", "unset"},
    "error-feedback-4bit": {
        "step", "exp_avg", "exp_avg_sq", "error.packed", "error.scale", "index", "pending", "unset",
    },
    "trion-8bit": {"step", "error.codes", "error.scale", "index", "pending", "unset"},
    "muon": {"step", "exp_avg"},
    "normuon": {"step", "exp_avg", "row_sq", "column_sq"},
    "conda": {"step", "exp_avg", "exp_avg_sq", "basis", "pending", "unset"},
    "ldadam": {"step", "exp_avg", "exp_avg_sq", "error", "basis", "pending", "unset"},
    "compensated": {
        "step", "exp_avg", "exp_avg_sq", "basis", "pending", "unset", "residual_sq",
        "residual_norm",
    },
    "racs": {"step", "row_scale", "column_scale", "update_norm"},
}  # fmt: skip
GROUP_KEYS = {
    "grad_norm", "state_version",
    "params", "lr", "betas", "eps", "weight_decay", "rank", "min_dim", "state_budget",
    "update_proj_gap", "scale", "feed", "projector", "rule", "residual", "side", "on_refresh",
    "state_dtype", "stochastic_rounding", "skip_nonfinite", "maximize", "capturable", "seed",
    "impl", "skipped_steps", "stagger", "shard_basis", "length",
}  # fmt: skip
NUMBERS = {
    "fira": {"limiter"},
    "frugal": {"state_free_scale"},
    "frugal-blocks": {"state_free_scale"},
    "apollo": {"limiter"},
    "error-feedback-4bit": {"keep"},
    "trion-8bit": {"iterations", "keep"},
    "muon": {"iterations", "momentum", "nesterov"},
    "normuon": {"iterations", "momentum", "nesterov"},
    "ldadam": {"keep", "rho"},
    "compensated": {"beta", "compensation", "limiter"},
    "racs": {"beta", "iterations", "limiter"},
}
"""Keys of the groups of single methods: the numbers that their parts read."""
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def through_a_file(state_dict):
    """Return what comes back from torch.save and a safe torch.load."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def is_plain(value):
    """Return whether a value is made of tensors, numbers, text and None in plain containers."""
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (torch.Tensor, int, float, bool, str)


STOPS, END = (GAP - 2, GAP, GAP + 1, 2 * GAP), 3 * GAP + 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROTATED = in_turn(CASES, *DTYPES, every=CASES[:1])
"""Every method in one dtype or another."""


@pytest.mark.parametrize(("case", "dtype"), ROTATED, ids=str)
def test_resume_is_bit_identical(case, dtype):
    whole = Model(dtype)
    uninterrupted = case.build(whole.parameters())
    files, last = {}, 0
    for stop in (*STOPS, END):
        train(whole, uninterrupted, range(last, stop))
        last = stop
        both = {"model": whole.state_dict(), "optimizer": uninterrupted.state_dict()}
        files[stop] = through_a_file(both)
    for stop in STOPS:
        second = Model(dtype, seed=9)
        second.load_state_dict(files[stop]["model"])
        resumed = case.build(second.parameters())
        resumed.load_state_dict(files[stop]["optimizer"])
        train(second, resumed, range(stop, END))
        assert_same(weights(second), weights(whole))
        for left, right in zip(whole.parameters(), second.parameters(), strict=True):
            ours, theirs = uninterrupted.state[left], resumed.state[right]
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                assert type(value) is type(theirs[key])
                if isinstance(value, torch.Tensor):
                    assert value.dtype == theirs[key].dtype
                    assert torch.equal(value, theirs[key])
                else:
                    assert value == theirs[key]


@each_case
def test_numbers_come_from_the_checkpoint(case):
    model = Model()
    optimizer = case.build(model.parameters())
    resumed = case.build(model.parameters(), lr=0.5)
    with pytest.warns(UserWarning, match=r"from the checkpoint lr 0.0\d+ \(here 0\.5\)$"):
        resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@each_case
def test_state_is_plain_and_flat(case):
    model = Model()
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, range(GAP + 1))
    state_dict = optimizer.state_dict()
    assert is_plain(state_dict)
    for state in state_dict["state"].values():
        assert all(isinstance(value, (torch.Tensor, int, float)) for value in state.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.name in KEYS], ids=str)
def test_keys_are_frozen(case):
    """A checkpoint of today must load tomorrow: changing these names needs a migration."""
    model = Model()
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(1))
    assert set(optimizer.state[model.tall]) == KEYS[case.name]
    plain = {"step", "exp_avg"} if case.name == "lion" else {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[model.vector]) == plain
    assert set(optimizer.state_dict()["param_groups"][0]) == GROUP_KEYS | NUMBERS.get(
        case.name, set()
    )


def test_a_checkpoint_of_a_later_version_is_refused_and_one_without_is_read():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    assert [type(group["state_version"]) for group in saved["param_groups"]] == [int]
    before = through_a_file(optimizer.state_dict())
    saved["param_groups"][0]["state_version"] += 1
    with pytest.raises(ValueError, match=r"state_version 3, this package reads up to 2: upgrade"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[model.tall]["basis"], before["state"][0]["basis"])
    for key in ("state_version", "grad_norm", "feed", "state_budget"):
        del before["param_groups"][0][key]
    optimizer.load_state_dict(before)
    assert optimizer.state_dict()["param_groups"][0]["state_version"] == 2


def test_state_dtype_survives_and_is_not_shared():
    model = Model(torch.bfloat16)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    other_model = Model(torch.bfloat16)
    other = GaLoreAdamW(other_model.parameters(), rank=RANK)
    other.load_state_dict(saved)
    state = other.state[other_model.tall]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "basis")} == {torch.float32}
    kept = saved["state"][0]["exp_avg"].clone()
    train(other_model, other, range(2, 4))
    assert torch.equal(saved["state"][0]["exp_avg"], kept)


def test_hooks_of_the_user_see_the_checkpoint_and_the_final_state():
    model = Model(torch.bfloat16)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    other = GaLoreAdamW(model.parameters(), rank=RANK)
    seen = []

    def rename(_, state_dict):
        return {**state_dict, "state": {k: dict(v) for k, v in state_dict["state"].items()}}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[model.tall]["exp_avg"].dtype)
    )
    other.load_state_dict(saved)
    other.load_state_dict(saved)
    assert seen == [torch.float32] * 2


REFUSED = {
    "rank": (
        lambda p: GaLoreAdamW(p, rank=2),
        r"ranks of parameter 0 of group 0, of shape \(13, 7\).*rank 3 in the checkpoint, 2 here",
    ),
    "projector": (lambda p: GaLoreAdamW(p, rank=RANK, projector="power"), "projector=SVD()"),
    "method": (lambda p: FiraAdamW(p, rank=RANK), "residual=Drop()"),
    "rule": (lambda p: LowRank(p, rank=RANK, rule="lion", scale=0.25), "rule=Adam()"),
    "side": (lambda p: GaLoreAdamW(p, rank=RANK, side="right"), "side=auto"),
    "on_refresh": (lambda p: GaLoreAdamW(p, rank=RANK, on_refresh="reset"), "on_refresh=keep"),
    "fewer parameters": (lambda p: GaLoreAdamW(list(p)[:-1], rank=RANK), "9.*8"),
    "other shapes": (lambda p: GaLoreAdamW(list(p)[::-1], rank=RANK), "parameter 0 of group 0"),
    "dct": (lambda p: DCTAdamW(p, rank=RANK), "projector=SVD()"),
    "columns": (lambda p: FrugalAdamW(p, rank=RANK), "SVD()"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(change):
    factory, message = REFUSED[change]
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    other_model = Model()
    other = factory(other_model.parameters())
    if change not in ("fewer parameters",):
        train(other_model, other, range(1))
    before = through_a_file(other.state_dict())
    with pytest.raises(ValueError, match=message.replace("()", r"\(\)")):
        other.load_state_dict(saved)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][key][k]))
                   for k, v in state.items())  # fmt: skip
    train(other_model, other, range(1, 2))


def test_truncated_state_is_refused():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    del saved["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError, match="only this optimizer has 'exp_avg_sq' for parameter 0"):
        GaLoreAdamW(Model().parameters(), rank=RANK).load_state_dict(saved)
