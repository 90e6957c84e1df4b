"""What every torch optimizer promises, over the table of cases."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from helpers.cases import (
    CASES,
    GAP,
    PRESETS,
    PROJECTED,
    SHAPES,
    Model,
    assert_same,
    gradient,
    train,
    weights,
)
from lowrank_optim import RACS, RMNPW, GaLoreAdamW, MuonW, NorMuonW, TrionW
from lowrank_optim.settings.plans import numbers_in

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_step_moves_every_parameter_that_has_a_gradient(case):
    model = Model()
    optimizer = case.build(model.parameters())
    start = weights(model)
    train(model, optimizer, range(2 * GAP + 1))
    for name, param in model.named_parameters():
        assert param.isfinite().all()
        assert torch.equal(param, start[name]) == (param.numel() == 0), name


@each_case
def test_two_runs_are_bit_identical(case):
    results = []
    for _ in range(2):
        model = Model()
        train(model, case.build(model.parameters()), range(2 * GAP + 1))
        results.append(weights(model))
    assert_same(*results)


@each_case
def test_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(case):
    model = Model()
    optimizer = case.build(model.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in model.parameters())
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(12)]
    assert calls == [True] * 12
    assert all(loss.requires_grad for loss in losses)
    if not optimizer.defaults["maximize"]:
        assert losses[-1] < losses[0]
    assert optimizer.step() is None


@each_case
def test_parameter_without_gradient_keeps_its_value_and_has_state(case):
    model = Model()
    optimizer = case.build(model.parameters())
    start = weights(model)
    for position, param in enumerate(model.parameters()):
        param.grad = gradient(param, 0, position)
    model.tall.grad = model.vector.grad = None
    optimizer.step()
    assert torch.equal(model.tall, start["tall"])
    assert torch.equal(model.vector, start["vector"])
    assert set(optimizer.state) == set(model.parameters())
    assert float(optimizer.state[model.tall]["step"]) == 0
    assert float(optimizer.state[model.wide]["step"]) == 1


@each_case
def test_frozen_parameter_gets_no_state(case):
    model = Model()
    model.wide.requires_grad_(False)
    optimizer = case.build(model.parameters())
    for position, param in enumerate(model.parameters()):
        if param.requires_grad:
            param.grad = gradient(param, 0, position)
    optimizer.step()
    assert model.wide not in optimizer.state


@each_case
def test_nothing_is_kept_before_the_first_step_and_parameters_may_be_swapped(case):
    """Trainers replace the parameters of a built optimizer (FSDP2 under accelerate)."""
    swapped, plain = Model(), Model()
    optimizer = case.build(Model(seed=5).parameters())
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["params"][:] = list(swapped.parameters())
    train(swapped, optimizer, range(GAP + 2))
    train(plain, case.build(plain.parameters()), range(GAP + 2))
    assert_same(weights(swapped), weights(plain))


@each_case
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike_and_apart(case, way):
    model = Model()
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(GAP + 1))
    twin_model, twin = way((model, optimizer))
    train(model, optimizer, range(GAP + 1, 2 * GAP + 2))
    before = weights(model)
    train(twin_model, twin, range(GAP + 1, 2 * GAP + 2))
    assert_same(weights(model), before)
    assert_same(weights(twin_model), before)


@each_case
def test_strides_do_not_matter(case):
    """Non-contiguous weights and gradients, channels-last convolutions: the same numbers."""
    straight, strided = Model(torch.float64), Model(torch.float64)
    for name in ("tall", "wide", "square"):
        value = getattr(strided, name).detach()
        setattr(strided, name, torch.nn.Parameter(value.t().contiguous().t()))
    channels_last = strided.conv.detach().contiguous(memory_format=torch.channels_last)
    strided.conv = torch.nn.Parameter(channels_last)
    every_second = torch.zeros(3, 16, 5, dtype=torch.float64)[:, ::2]
    every_second.copy_(strided.stack.detach())
    strided.stack = torch.nn.Parameter(every_second)
    assert not any(getattr(strided, name).is_contiguous() for name in PROJECTED)
    optimizers = case.build(straight.parameters()), case.build(strided.parameters())
    for step in range(2 * GAP + 1):
        for position, (name, param) in enumerate(straight.named_parameters()):
            param.grad = gradient(param, step, position)
            other = getattr(strided, name)
            other.grad = torch.empty_like(other).copy_(param.grad)
        for optimizer in optimizers:
            optimizer.step()
    tolerance = 1e-2 if case.coarse else 1e-10
    for name, param in straight.named_parameters():
        other = getattr(strided, name)
        torch.testing.assert_close(param, other, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.name not in ("frugal-blocks", "galore-rounding") and not case.chooses
    ],
    ids=str,
)
def test_stack_is_projected_matrix_by_matrix(case):
    """A stack moves as its matrices would on their own.

    Not so for blocks and stochastic rounding: turns and noise go by parameter, and it is one; nor
    for ranks that are chosen, of which a stack has one.
    Rounded moments differ by that noise.
    """
    stack = torch.nn.Parameter(Model(torch.float64).stack.detach().clone())
    alone = [torch.nn.Parameter(part.detach().clone()) for part in stack]
    together, apart = case.build([stack]), case.build(alone, stagger=False)
    for step in range(2 * GAP + 1):
        stack.grad = gradient(stack, step, 0)
        for part, grad in zip(alone, stack.grad, strict=True):
            part.grad = grad.clone()
        together.step()
        apart.step()
    tolerance = 1e-6 if "power" in case.name else 1e-10
    if case.coarse:
        tolerance = 1e-2
    torch.testing.assert_close(stack, torch.stack(list(alone)), rtol=0, atol=tolerance)


@each_case
def test_added_group_and_group_settings(case):
    """A group added late trains from then on, with its own settings."""
    model, late = Model(), torch.nn.Parameter(torch.randn(12, 6))
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [late], "lr": 0.0, "weight_decay": 0.5})
    start = late.detach().clone()
    late.grad = torch.randn(12, 6)
    train(model, optimizer, range(2, 3))
    assert torch.equal(late, start)
    optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step()
    assert not torch.equal(late, start)


@each_case
def test_named_parameters_hooks_repr_and_zero_grad(case):
    model = Model()
    optimizer = case.build(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == list(SHAPES)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, range(1))
    assert seen == ["pre", "post"]
    assert type(optimizer).__name__ in repr(optimizer)
    assert "rank" in repr(optimizer)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    train(model, optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None for param in model.parameters())
    assert not any(param.grad.any() for param in model.parameters())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=12),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
    ],
)
def test_schedulers_set_the_rate_that_is_applied(schedule):
    """Without decay the update is linear in lr: dividing it out gives the same direction."""

    def directions(scheduled, betas):
        model = Model(torch.float64)
        optimizer = GaLoreAdamW([model.tall], lr=1e-2, rank=3, weight_decay=0.0)
        scheduler = schedule(optimizer) if scheduled else None
        (group,) = optimizer.param_groups
        for step in range(8):
            before = model.tall.detach().clone()
            model.tall.grad = gradient(model.tall, step, 0)
            if scheduler is None:
                group["betas"] = betas[step]
            else:
                betas.append(group["betas"])
            optimizer.step()
            yield (model.tall.detach() - before) / float(group["lr"])
            if scheduler is not None:
                scheduler.step()

    betas: list[tuple[float, float]] = []
    scheduled = list(directions(True, betas))
    for left, right in zip(scheduled, directions(False, betas), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_cycle_moves_betas_and_no_number_of_a_part(preset):
    """Where the rule of matrices has a momentum of its own, they do not notice."""
    ends = []
    for cycles in (True, False):
        param = torch.nn.Parameter(torch.ones(13, 7))
        optimizer = preset([param], rank=3, min_dim=1, length="published")
        (group,) = optimizer.param_groups
        schedule = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9, cycle_momentum=cycles)
        before = {key: group[key] for key in ("betas", *numbers_in(group))}
        for step in range(4):
            param.grad = gradient(param, step, 0)
            optimizer.step()
            schedule.step()
        moved = [key for key, value in before.items() if group[key] != value]
        assert moved == (["betas"] if cycles else [])
        ends.append(param.detach())
    same = preset in (MuonW, NorMuonW, RMNPW, TrionW, RACS)
    assert torch.equal(*ends) == same


def test_learning_rate_as_tensor_projects_alike():
    for case in CASES:
        number, tensor = Model(torch.float64), Model(torch.float64)
        rate = torch.tensor(7e-3, dtype=torch.float64)
        train(number, case.build(number.parameters(), lr=7e-3), range(GAP + 2))
        train(tensor, case.build(tensor.parameters(), lr=rate), range(GAP + 2))
        for name, param in number.named_parameters():
            other = getattr(tensor, name)
            torch.testing.assert_close(param, other, rtol=0, atol=1e-10, msg=f"{case} {name}")


@each_case
def test_rehearsal_step_leaves_no_trace(case):
    """The zero-gradient, lr 0 step of distributed checkpointing creates state and does no more."""
    rehearsed, plain = Model(), Model()
    optimizer = case.build(rehearsed.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    for param in rehearsed.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert len(optimizer.state) == len(SHAPES)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    train(rehearsed, optimizer, range(GAP + 2))
    train(plain, case.build(plain.parameters()), range(GAP + 2))
    assert_same(weights(rehearsed), weights(plain))
