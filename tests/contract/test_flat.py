"""A state taken apart into named tensors and text comes back whole, through safetensors."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.cases import CASES, GAP, RANK, SHAPES, Model, assert_same, train, weights
from lowrank_optim import FiraAdamW, GaLoreAdamW, flatten_state, unflatten_state
from lowrank_optim.parts.checks import SettingError

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def through_a_file(state_dict, path):
    """Return what comes back from a safetensors file, and what it was called there."""
    tensors, metadata = flatten_state(state_dict)
    save_file(tensors, path, metadata)
    with safe_open(path, "pt") as file:
        text = file.metadata()
    return unflatten_state(load_file(path), text), tensors


def assert_equal(left, right, where="state_dict"):
    """Assert that two trees are the same in kinds, values, dtypes, strides and bits."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert left.stride() == right.stride(), where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{where}[{place}]")
    else:
        assert left == right, where


def params_of(model, named):
    return model.named_parameters() if named else model.parameters()


@each_case
@pytest.mark.parametrize(("dtype", "named"), [(torch.float32, True), (torch.bfloat16, False)])
def test_resume_from_a_file_is_bit_identical(case, dtype, named, tmp_path):
    stop, end = GAP + 1, 2 * GAP + 2
    whole = Model(dtype)
    optimizer = case.build(params_of(whole, named))
    train(whole, optimizer, range(stop))
    saved = optimizer.state_dict()
    loaded, tensors = through_a_file(saved, tmp_path / "a.safetensors")
    assert_equal(loaded, saved)
    place = list(SHAPES).index("tall")
    assert ("tall.step" if named else f"{place}.step") in tensors

    other = Model(dtype, seed=9)
    other.load_state_dict(whole.state_dict())
    resumed = case.build(params_of(other, named))
    resumed.load_state_dict(loaded)
    train(whole, optimizer, range(stop, end))
    train(other, resumed, range(stop, end))
    assert_same(weights(other), weights(whole))


def test_names_with_dots_are_not_ambiguous(tmp_path):
    """Parameters called as if they were entries of others, and a group's entries."""
    names = ["w", "w.exp_avg", "w.exp_avg.codes", "param_groups.0", "0", "w"]
    params = [torch.nn.Parameter(torch.full((70, 64), float(place))) for place in range(6)]
    groups = [
        {"params": list(zip(names[:4], params[:4], strict=True)), "rank": 4},
        {"params": list(zip(names[4:], params[4:], strict=True))},
    ]
    optimizer = GaLoreAdamW(groups, lr=torch.tensor(0.1), state_dtype="8bit", projector="power")
    for place, param in enumerate(params):
        param.grad = torch.randn(70, 64, generator=torch.Generator().manual_seed(place))
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][1]["codes"] = torch.zeros(3, dtype=torch.uint8)
    loaded, tensors = through_a_file(saved, tmp_path / "a.safetensors")
    assert_equal(loaded, saved)
    assert "w.exp_avg.codes" in tensors
    held = [state.values() for state in saved["state"].values()]
    assert len(tensors) == 2 + sum(isinstance(x, torch.Tensor) for part in held for x in part)


def test_group_values_come_back_as_they_were(tmp_path):
    """Floats to the bit, pairs as tuples, one rate that groups share as two tensors."""
    rate = torch.tensor(0.1 + 0.2, dtype=torch.float64)
    model = Model()
    optimizer = FiraAdamW(model.named_parameters(), lr=rate, rank=RANK, betas=(0.1 + 0.2, 1 / 3))
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    odd = {"a": [1, (2, None)], 3: {"x": "text", None: True}, "tensor": "no tensor"}
    group.update(odd=odd, tiny=5e-324, least=-0.0, most=float("inf"), lr2=rate)
    loaded, tensors = through_a_file(saved, tmp_path / "a.safetensors")
    assert_equal(loaded, saved)
    read = loaded["param_groups"][0]
    assert str(read["least"]) == "-0.0"
    assert read["betas"] == (0.1 + 0.2, 1 / 3)
    assert tensors["param_groups.0.lr"].data_ptr() != tensors["param_groups.0.lr2"].data_ptr()


def test_strides_come_back_and_tensors_are_apart(tmp_path):
    """Moments of a channels-last weight are written as safetensors wants them, and read as before.

    Views of one memory are written apart.
    """
    weight = torch.nn.Parameter(torch.ones(6, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW([{"params": [weight]}, {"params": [matrix], "rank": 2}])
    weight.grad, matrix.grad = torch.ones_like(weight), torch.ones_like(matrix)
    optimizer.step()
    saved = optimizer.state_dict()
    assert not saved["state"][0]["exp_avg"].is_contiguous()
    whole = torch.arange(12.0)
    saved["state"][1].update(first=whole[:6], all=whole, part=whole.view(3, 4)[:, 1])
    loaded, tensors = through_a_file(saved, tmp_path / "a.safetensors")
    assert_equal(loaded, saved)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["1.exp_avg"].data_ptr() == saved["state"][1]["exp_avg"].data_ptr()


def test_any_optimizer_can_be_written(tmp_path):
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.named_parameters(), amsgrad=True)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    loaded, tensors = through_a_file(optimizer.state_dict(), tmp_path / "a.safetensors")
    assert_equal(loaded, optimizer.state_dict())
    assert "weight.max_exp_avg_sq" in tensors
    torch.optim.AdamW(model.named_parameters(), amsgrad=True).load_state_dict(loaded)


def test_metadata_is_text_that_says_what_is_what():
    model = Model()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=RANK)
    tensors, metadata = flatten_state(optimizer.state_dict())
    assert tensors == {}
    assert all(isinstance(item, str) for pair in metadata.items() for item in pair)
    assert metadata["format"] == "pt"
    assert json.loads(metadata["state"]) == []
    assert "tall" in metadata["param_groups"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=1), r"alone, this one has \['state', 'param_groups', 'extra'\]"),
        (lambda s: s.pop("state"), r"this one has \['param_groups'\]"),
        (
            lambda s: s["param_groups"][0].update(mine=object()),
            r"param_groups\.0\.mine is a object",
        ),
        (lambda s: s["state"][0].update(a=[1, {2}]), r"tall\.a\.1 is a set"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(change, message):
    model = Model()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=RANK)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    change(saved)
    with pytest.raises(ValueError, match=message):
        flatten_state(saved)


def test_what_is_missing_is_said():
    model = Model()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=RANK)
    train(model, optimizer, range(1))
    tensors, metadata = flatten_state(optimizer.state_dict())
    for wrong in (None, {"format": "pt"}, {"state": metadata["state"]}):
        with pytest.raises(ValueError, match="not from flatten_state"):
            unflatten_state(tensors, wrong)
    del tensors["tall.basis"]
    with pytest.raises(ValueError, match=r"tensor 'tall\.basis' is missing"):
        unflatten_state(tensors, metadata)


def test_damaged_metadata_is_refused_in_one_way():
    """Pieces of the text are lost or doubled; what still can be read is another state dict."""
    model = Model()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=RANK)
    train(model, optimizer, range(1))
    tensors, metadata = flatten_state(optimizer.state_dict())
    refused = 0
    for number in range(60):
        rng, key = random.Random(number), ("state", "param_groups")[number % 2]
        text = metadata[key]
        first, last = sorted(rng.randrange(len(text)) for _ in range(2))
        middle = text[first:last] * rng.choice([0, 2])
        try:
            unflatten_state(tensors, {**metadata, key: text[:first] + middle + text[last:]})
        except SettingError:
            refused += 1
    assert refused > 30
    strange = metadata["state"].replace('"stride": [', '"stride": [-', 1)
    strange = strange.replace('"stride": [-]', '"stride": [-1]')
    with pytest.raises(SettingError, match="damaged"):
        unflatten_state(tensors, {**metadata, "state": strange})
