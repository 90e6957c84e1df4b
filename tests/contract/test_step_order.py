"""Any form of step after any other, settings changed between, and steps that cannot be done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.cases import CASES, Model, assert_same, gradient, weights
from helpers.layerwise import assert_same_state, loss_of
from lowrank_optim import GaLoreAdamW, MuonW

each_case = pytest.mark.parametrize("case", CASES, ids=str)
FORMS = ("step", "step_param", "some and step", "backward")
MIXED = [case for case in CASES if str(case) in ("galore-power", "dct", "frugal", "fira", "trion")]


def take(form, model, optimizer, step):
    """Take a step in one of the forms that there are."""
    if form == "backward":
        handle = optimizer.step_in_backward()
        loss_of(model, step).backward()
        optimizer.step()
        handle.remove()
        return
    loss_of(model, step).backward()
    params = list(model.parameters())
    for param in {"step": [], "some and step": params[::2], "step_param": params}[form]:
        optimizer.step_param(param)
        param.grad = None
    if form != "step_param":
        optimizer.step()
    model.zero_grad()


CHANGES = st.sampled_from(
    [
        {},
        {"lr": 3e-3},
        {"update_proj_gap": 2},
        {"seed": 5},
        {"weight_decay": 0.3},
        {"maximize": True},
    ]
)


@pytest.mark.parametrize("case", MIXED, ids=str)
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FORMS), CHANGES), min_size=2, max_size=4))
def test_any_form_follows_any_other(case, steps):
    """Settings that were changed meanwhile are those of the next step, in whatever form it is."""
    models = [Model(), Model()]
    plain, mixed = (case.build(model.named_parameters()) for model in models)
    for number, (form, change) in enumerate(steps):
        for form_here, model, optimizer in zip(("step", form), models, (plain, mixed), strict=True):
            optimizer.param_groups[0].update(change)
            take(form_here, model, optimizer, number)
    assert_same(*map(weights, models))
    assert_same_state(plain, mixed)


@pytest.mark.parametrize("form", FORMS)
def test_values_spoiled_after_step_param_are_refused(form):
    model = Model()
    optimizer = CASES[0].build(model.parameters())
    take("step_param", model, optimizer, 0)
    before = weights(model)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr=nan in group 0"):
        take(form, model, optimizer, 1)
    assert_same(weights(model), before)


def test_a_rate_spoiled_between_backward_and_step_is_refused():
    model = Model()
    optimizer = CASES[0].build(model.parameters())
    optimizer.step_in_backward()
    loss_of(model, 0).backward()
    before = weights(model)
    model.late = nn.Parameter(torch.ones(7, 5))
    optimizer.add_param_group({"params": [model.late]})
    model.late.grad = torch.ones(7, 5)
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr=nan in group 1"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step()
    after = weights(model)
    assert not torch.equal(after.pop("late"), torch.ones(7, 5))
    assert_same(after, before)


def test_a_refused_step_does_not_make_the_one_under_way_that_of_new_settings():
    model = Model()
    optimizer = CASES[0].build(model.parameters())
    optimizer.step_in_backward()
    loss_of(model, 0).backward()
    optimizer.param_groups[0]["rank"] = 2
    before = weights(model)
    for _ in range(2):
        model.square.grad = torch.ones_like(model.square)
        with pytest.raises(RuntimeError, match="cannot change once there is state"):
            optimizer.step()
    assert_same(weights(model), before)


def snapshot(model, optimizer):
    """Copies of weights and states."""
    states = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for p in model.parameters()
    ]
    return weights(model), states


def assert_unchanged(before, model, optimizer):
    old, states = before
    assert_same(old, weights(model))
    for state, param in zip(states, model.parameters(), strict=True):
        now = optimizer.state[param]
        assert state.keys() == now.keys()
        for key, value in state.items():
            same = (
                torch.equal(value, now[key])
                if isinstance(value, torch.Tensor)
                else value == now[key]
            )
            assert same, key


def trained(case, dtype=torch.float32, **changes):
    model = Model(dtype)
    optimizer = case.build(model.named_parameters(), **changes)
    for step in range(2):
        for place, param in enumerate(model.parameters()):
            param.grad = gradient(param, step, place)
        optimizer.step()
    return model, optimizer


AT_ANY_DTYPE = ("galore-bf16-state", "galore-8bit", "dct-8bit", "trion-8bit", "muon-8bit")
"""Cases whose state is the same for float32 and float64 parameters."""


@each_case
def test_a_model_made_double_is_refused_before_anything_moves(case):
    model, optimizer = trained(case)
    model.square.data = model.square.data.double()
    model.square.grad = torch.ones_like(model.square)
    before = snapshot(model, optimizer)
    if str(case) in AT_ANY_DTYPE:
        optimizer.step()
        assert not torch.equal(model.square, before[0]["square"])
        return
    with pytest.raises(RuntimeError, match=r"state of parameter 'square'.*cannot change once"):
        optimizer.step()
    assert_unchanged(before, model, optimizer)


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_a_model_made_bfloat16_goes_on_with_its_float32_state(case):
    model, optimizer = trained(case)
    model.to(torch.bfloat16)
    before = weights(model)
    loss_of(model, 3).backward()
    optimizer.step()
    assert all(model.get_parameter(name).dtype == torch.bfloat16 for name in before)
    assert not torch.equal(model.square, before["square"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("galore", {"rank": 2}),
        ("galore", {"rank": None}),
        ("galore", {"side": "reverse"}),
        ("galore", {"on_refresh": "reset"}),
        ("galore", {"state_dtype": "bfloat16"}),
        ("fira", {"residual": "drop"}),
        ("dct", {"state_dtype": "8bit"}),
        ("trion", {"rank": 2}),
        ("trion", {"rank": None}),
        ("muon", {"rank": None}),
        ("racs", {"rank": None}),
        ("auto-rank", {"rank": None}),
        ("frugal-blocks", {"rank": 1.0}),
    ],
)
def test_settings_that_decide_the_state_are_refused_before_anything_moves(name, change):
    case = next(case for case in CASES if str(case) == name)
    model, optimizer = trained(case)
    group = optimizer.param_groups[0]
    optimizer.param_groups = [
        {**group, "params": group["params"][:3]},
        {**group, "params": group["params"][3:], **change},
    ]
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"cannot change once there is state"):
        optimizer.step()
    assert_unchanged(before, model, optimizer)


def test_state_of_plain_adamw_is_none_of_a_whole_matrix():
    param = nn.Parameter(torch.randn(13, 7))
    other = nn.Parameter(torch.randn(9, 5))
    optimizer = MuonW([{"params": [param], "rank": None}, {"params": [other]}])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = 1.0
    with pytest.raises(RuntimeError, match=r"'exp_avg_sq'.*cannot change once there is state"):
        optimizer.step()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(exp_avg=state["exp_avg"][:-1]),
        lambda state: state.update(ema=state.pop("exp_avg")),
        lambda state: state.update(exp_avg=state["exp_avg"].half()),
        lambda state: state.update(basis=state["basis"].double()),
    ],
)
def test_a_state_that_was_edited_is_compared_again(spoil):
    model, optimizer = trained(CASES[0])
    spoil(optimizer.state[model.square])
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"state of parameter 'square'.*del optimizer\.state"):
        optimizer.step()
    assert_unchanged(before, model, optimizer)
    del optimizer.state[model.square]
    optimizer.step()


def test_layer_wise_a_parameter_taken_out_is_left_alone_and_may_come_back():
    model, twin = Failing(9), Failing(9)
    optimizers = [
        GaLoreAdamW(net.parameters(), lr=1e-2, rank=3, stagger=False) for net in (model, twin)
    ]
    optimizers[0].step_in_backward()
    for step, taken in enumerate((False, True, False, False)):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            params = list(net.parameters())
            optimizer.param_groups[0]["params"] = params[1:] if taken else params
            net(data(step)).backward()
            optimizer.step()
            net.zero_grad()
        assert_same(weights(model), weights(twin))


class Failing(nn.Module):
    """Layers whose backward pass runs out of memory at one of them, as long as it is told to."""

    def __init__(self, at):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.at, self.fails = at, False

    def forward(self, x, reentrant=None):
        for place, layer in enumerate(self.layers):
            if place == self.at and x.requires_grad:
                x.register_hook(self.run_out)
            x = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        return x.square().mean()

    def run_out(self, grad):
        if self.fails:
            raise RuntimeError("out of memory")
        return grad


def data(step):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(5, 9, generator=rng, requires_grad=True)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_after_a_backward_pass_that_failed_the_next_one_works(at, reentrant):
    """What was stepped before the exception is stepped again, as by a loop that retries."""
    model, twin = Failing(at), Failing(at)
    optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=3)
    ordinary = GaLoreAdamW(twin.parameters(), lr=1e-2, rank=3)
    optimizer.step_in_backward()
    model(data(0), reentrant).backward()
    optimizer.step()
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(data(1), reentrant).backward()
    model.fails = False
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    ordinary.load_state_dict(optimizer.state_dict())
    for step in (2, 3):
        for net, opt in ((model, optimizer), (twin, ordinary)):
            net(data(step), reentrant).backward()
            opt.step()
            net.zero_grad()
    assert_same(weights(model), weights(twin))
    assert_same_state(optimizer, ordinary)


@pytest.mark.parametrize("accumulate", ["full", "projected"])
def test_a_failed_pass_forgets_what_was_accumulated(accumulate):
    model = Failing(1)
    optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=3)
    optimizer.step_in_backward(accumulation_steps=2, accumulate=accumulate)
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(data(1)).backward()
    model.fails = False
    model.zero_grad()
    before = weights(model)
    model(data(2)).backward()
    assert_same(weights(model), before)
    model(data(3)).backward()
    assert not torch.equal(model.layers[2].weight, before["layers.2.weight"])
    optimizer.step()
    assert all(float(optimizer.state[param]["step"]) == 1 for param in model.parameters())


def test_a_parameter_of_two_reentrant_checkpoints_is_still_refused():
    """Its two gradients of one backward pass are no retry."""
    layer = nn.Linear(6, 6)
    optimizer = GaLoreAdamW(layer.parameters(), lr=1e-2, rank=2)
    optimizer.step_in_backward()
    x = torch.randn(3, 6, requires_grad=True)
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.square().mean().backward()


@pytest.mark.parametrize("passes", [2, 3])
def test_gradients_given_up_before_a_pass_are_not_counted(passes):
    """As after running out of memory in a forward pass, and `model.zero_grad()`."""
    model = Failing(9)
    optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=3)
    optimizer.step_in_backward(accumulation_steps=passes)
    before = weights(model)
    for _ in range(2):
        for step in range(passes - 1):
            model(data(step)).backward()
        model.zero_grad()
        assert_same(weights(model), before)
    for step in range(passes):
        assert_same(weights(model), before)
        model(data(step)).backward()
    assert not torch.equal(model.layers[2].weight, before["layers.2.weight"])
    optimizer.step()
