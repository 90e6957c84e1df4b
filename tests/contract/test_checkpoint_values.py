"""What a checkpoint holds is looked at before anything changes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from helpers.cases import CASES, GAP, RANK, Model, gradient, train
from helpers.damages import damaged, outcome, same
from lowrank_optim import GaLoreAdamW, LowRank, StateFree
from lowrank_optim.parts.checks import SettingError
from lowrank_optim.parts.kinds import COLUMNS, COUNT, FLAG, NORM, NOT_NEGATIVE, NUMBER, UNIT

each_case = pytest.mark.parametrize("case", CASES, ids=str)
NAN, INF = float("nan"), float("inf")


def saved_by(case, steps=GAP + 1):
    model = Model()
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, range(steps))
    return optimizer.state_dict()


def started(case):
    """Return parameters with gradients and an optimizer after one step."""
    model = Model(seed=3)
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, range(1))
    for position, param in enumerate(model.parameters()):
        param.grad = gradient(param, 1, position)
    return list(model.parameters()), optimizer


def refused(case, saved, match):
    """Assert that a checkpoint is refused with a message, and changes nothing."""
    params, optimizer = started(case)
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(SettingError, match=match):
        optimizer.load_state_dict(saved)
    assert same(before, (params, optimizer.state_dict()))


@each_case
def test_a_damaged_checkpoint_is_refused_or_good(case):
    saved = saved_by(case)
    for number in range(6):
        bad, what = damaged(saved, random.Random(f"{case} {number}"))
        found = outcome(lambda: started(case), lambda optimizer: optimizer.load_state_dict(bad))  # noqa: B023
        assert found in ("refused", "taken"), what


BAD = {
    "nan": (NAN, lambda value: value.is_floating_point()),
    "infinite": (INF, lambda value: value.is_floating_point()),
    "below": (-1.0, lambda value: value.dtype not in (torch.uint8, torch.bool)),
    "far": (2.0**31, lambda value: value.dtype not in (torch.uint8, torch.bool, torch.int8)),
}
FREE = {
    "exp_avg": {"below", "far"}, "error": {"below", "far"}, "basis": {"below"},
    "sample.exp_avg": {"below", "far"},
    "residual_norm": {"infinite", "far"}, "update_norm": {"infinite", "far"}, "packed": {"below"},
}  # fmt: skip
"""What entries may be, as far as it is in the list above; all other may be none of it but far."""
COUNTS = ("step", "age", "drawn", "index")


@each_case
def test_every_entry_of_every_method_is_looked_at(case):
    """One bad value among good ones, in each entry of a projected parameter."""
    saved = saved_by(case)
    for key, value in saved["state"][0].items():
        if not isinstance(value, torch.Tensor) or not value.numel() or key == "pending":
            continue
        for bad, (number, applies) in BAD.items():
            name = key.rpartition(".")[2] if "packed" in key else key.partition(".")[0]
            free = FREE.get(key, FREE.get(name))
            far = bad == "far" and key not in (*COUNTS, "basis")
            scale = key.endswith(".scale")
            if not applies(value) or far or (not scale and free and bad in free):
                continue
            broken = copy.deepcopy(saved)
            broken["state"][0][key].view(-1)[-1] = number
            refused(case, broken, rf"'{key}' of parameter 'tall' .* must be .*, which it is not")


CHANGES = {
    "half a step": (lambda s: s["state"][1].update(step=1.5), r"'step' of .* 'wide' .*whole"),
    "a negative number": (lambda s: s["state"][6].update(step=-3), r"'step' of parameter 'vector'"),
    "steps as text": (lambda s: s["state"][1].update(step="3"), "'step' of .* is a str"),
    "a shape of steps": (lambda s: s["state"][1].update(step=torch.ones(2)), r"has shape \(2,\)"),
    "a waiting 2": (lambda s: s["state"][1].update(pending=2), "'pending' .* true or false"),
    "none": (lambda s: s["state"][1].update(exp_avg=None), "'exp_avg' of .* is a NoneType"),
    "sparse": (
        lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"].to_sparse()),
        "'exp_avg' of .* no dense tensor",
    ),
    "complex": (
        lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"].to(torch.complex64)),
        "no dense tensor of real numbers",
    ),
    "integers": (
        lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"].long()),
        r"is torch\.int64 in the checkpoint, not torch\.float32",
    ),
    "meta": (
        lambda s: s["state"][6].update(step=torch.zeros((), device="meta")),
        "'step' of .* is on \"meta\"",
    ),
    "no state of one": (lambda s: s["state"].update({0: None}), "parameter 0 is a NoneType"),
    "a list as a state": (lambda s: s["state"].update({0: [1]}), "parameter 0 is a list"),
    "numbers as text": (
        lambda s: s.update(state={str(k): v for k, v in s["state"].items()}),
        "states of '0', '1', '2' and 6 more, its groups have 0, 1, 2",
    ),
    "no states": (lambda s: s.pop("state"), "a state dict has 'state'"),
    "no groups": (lambda s: s.pop("param_groups"), "a state dict has 'state'"),
    "groups in a dict": (lambda s: s.update(param_groups={}), "a state dict has 'state'"),
    "a group that is none": (lambda s: s["param_groups"].__setitem__(0, None), "group 0 of the"),
    "a parameter twice": (
        lambda s: s["param_groups"][0]["params"].__setitem__(0, 1), "in its groups twice"
    ),
    "lr": (lambda s: s["param_groups"][0].update(lr=NAN), "lr=nan in group 0 of the checkpoint"),
    "lr on meta": (
        lambda s: s["param_groups"][0].update(lr=torch.ones((), device="meta")), "lr .*\"meta\""
    ),
    "betas": (lambda s: s["param_groups"][0].update(betas=(1.5, 0.9)), r"betas=\(1\.5, 0\.9\)"),
    "gap": (lambda s: s["param_groups"][0].update(update_proj_gap=0), "update_proj_gap=0"),
    "seed": (lambda s: s["param_groups"][0].update(seed=-1), "seed=-1"),
    "scale": (lambda s: s["param_groups"][0].update(scale=10**400), "scale=1000"),
    "rank": (lambda s: s["param_groups"][0].update(rank=-INF), "rank=-inf"),
    "skipped": (lambda s: s["param_groups"][0].update(skipped_steps=-1), "skipped_steps=-1"),
    "grad_norm": (lambda s: s["param_groups"][0].update(grad_norm="x"), "grad_norm='x'"),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
}  # fmt: skip


@pytest.mark.parametrize("why", CHANGES)
def test_the_message_names_what_is_wrong(why):
    change, message = CHANGES[why]
    saved = copy.deepcopy(saved_by(CASES[0]))
    change(saved)
    refused(CASES[0], saved, message)


@pytest.mark.parametrize("index", [[0, 1, 1], [2, 1, 0], [0, 1, 7], [-1, 0, 1], [0, 0, 0]])
@pytest.mark.parametrize("name", ["dct", "frugal"])
def test_a_choice_of_columns_is_one(name, index):
    case = next(case for case in CASES if case.name == name)
    saved = copy.deepcopy(saved_by(case))
    saved["state"][0]["index"].copy_(torch.tensor(index))
    refused(case, saved, "'index' of parameter 'tall' .* different columns in ascending order")


@pytest.mark.parametrize("wrong", [None, [], "x", 3])
def test_what_is_no_state_dict_says_so(wrong):
    with pytest.raises(SettingError, match="no state dict"):
        started(CASES[0])[1].load_state_dict(wrong)


def test_a_parts_own_entries_are_looked_at_as_far_as_it_says():
    class Remembers(StateFree):
        keys = ("seen",)

        def init(self, batch, rows, site):
            return {"seen": torch.zeros(batch)}

    model = Model()
    optimizer = LowRank(model.parameters(), rank=RANK, residual=Remembers())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["seen"].fill_(-3.0)
    optimizer.load_state_dict(saved)
    saved["state"][0]["seen"].fill_(NAN)
    with pytest.raises(SettingError, match=r"'seen' of parameter 0 .* must be finite"):
        optimizer.load_state_dict(saved)


ALLOWED = [
    (NUMBER, [-3.5, 0.0], [[NAN], [INF], [-INF]]),
    (NOT_NEGATIVE, [0.0, 2.5], [[NAN], [INF], [1.0, -3.5]]),
    (NORM, [0.0, INF], [[NAN], [-INF], [-1.0]]),
    (UNIT, [-1.0, 1.0], [[NAN], [INF], [0.0, 1.5]]),
    (COUNT, [0.0, 3.0], [[NAN], [INF], [2.5], [-1.0]]),
    (FLAG, [0.0, 1.0], [[NAN], [INF], [0.5], [2.0]]),
    (COLUMNS, [0.0, 4.0], [[NAN], [0.0, 5.0], [-1.0, 0.0], [2.0, 1.0], [1.0, 1.0], [0.5]]),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "good", "bad"), ALLOWED, ids=lambda x: getattr(x, "wanted", ""))
def test_kinds(kind, good, bad, dtype):
    assert kind.allows(torch.tensor(good, dtype=dtype), 5)
    assert kind.allows(torch.empty(0, dtype=dtype), 5)
    for values in bad:
        assert not kind.allows(torch.tensor(values, dtype=dtype), 5)


def test_a_checkpoint_of_another_optimizer_says_that_it_is_one():
    model = Model()
    for optimizer in (
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        torch.optim.Adam(list(model.parameters())[:2], amsgrad=True),
    ):
        train(model, optimizer, range(1))
        own = GaLoreAdamW(model.parameters(), rank=RANK)
        with pytest.raises(SettingError, match=r"one of another optimizer.*GaLoreAdamW.*start wit"):
            own.load_state_dict(optimizer.state_dict())
        assert not own.state
