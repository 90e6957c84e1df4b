"""Accelerate's loop: the plain loop's numbers, to the bit."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

from helpers.cases import GAP, gradient
from helpers.loops import (
    FEW,
    KINDS,
    Net,
    assert_same_run,
    batches,
    fit,
    halving,
    loss_of,
    states,
    trained,
)

each_case = pytest.mark.parametrize("case", KINDS, ids=str)
few_cases = pytest.mark.parametrize("case", FEW, ids=str)
STEPS = 2 * GAP + 2


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state a process: each test gets its own."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(case, accelerator, dtype=torch.float32):
    """Return model, optimizer and scheduler as `prepare` hands them out."""
    model = Net(dtype)
    optimizer = case.build(model.named_parameters())
    return accelerator.prepare(model, optimizer, halving(optimizer))


def run(accelerator, model, optimizer, scheduler, data, clip=0.5):
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@each_case
def test_the_loop_equals_the_plain_one(case):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer, scheduler = prepared(case, accelerator)
    assert isinstance(optimizer, AcceleratedOptimizer)
    data = batches(3 * STEPS)
    run(accelerator, model, optimizer, scheduler, data)
    plain = Net()
    other = case.build(plain.named_parameters())
    fit(plain, other, data, scheduler=halving(other), accumulate=3, clip=0.5)
    assert_same_run(model, optimizer.optimizer, plain, other)
    (group,) = optimizer.param_groups
    assert [group["lr"]] == scheduler.get_last_lr() == [group["initial_lr"] * 0.9**STEPS]


@each_case
def test_save_state_and_load_state_resume_bit_identically(case, tmp_path):
    """bf16 weights with float32 state: what comes back is not rounded to the weights' dtype."""
    stop = GAP + 1
    accelerator = Accelerator(cpu=True)
    whole = prepared(case, accelerator, torch.bfloat16)
    run(accelerator, *whole, batches(stop))
    accelerator.save_state(str(tmp_path))
    run(accelerator, *whole, batches(STEPS - stop, stop))
    accelerator.free_memory()
    resumed = prepared(case, accelerator, torch.bfloat16)
    run(accelerator, *resumed, batches(1, 99))
    accelerator.load_state(str(tmp_path))
    run(accelerator, *resumed, batches(STEPS - stop, stop))
    assert_same_run(resumed[0], resumed[1].optimizer, whole[0], whole[1].optimizer)
    assert resumed[2].get_last_lr() == whole[2].get_last_lr()


@few_cases
@pytest.mark.parametrize("steps", [0, GAP + 1])
def test_prepare_changes_nothing_in_an_optimizer(case, steps):
    """It loads the optimizer's own state dict, before the first step and after."""
    model, optimizer = trained(case, steps)
    groups = [dict(group) for group in optimizer.param_groups]
    before = states(optimizer)
    Accelerator(cpu=True).prepare(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert optimizer.state.keys() == (set(model.parameters()) if steps else set())
    after = states(optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@few_cases
def test_parameters_may_be_switched_as_fsdp2_does(case):
    """Placeholders of one value stand in the groups for a while, then other parameters."""
    old, new, plain = Net(), Net(), Net()
    optimizer = case.build(old.named_parameters())
    mapping = {}
    for before, after in zip(old.parameters(), new.parameters(), strict=True):
        mapping[before.data_ptr()] = after
    for group in optimizer.param_groups:
        for place, param in enumerate(group["params"]):
            group["params"][place] = torch.empty(1)
            group["params"][place].data_ptr = param.data_ptr()
    fsdp2_switch_optimizer_parameters(optimizer, mapping)
    optimizer.load_state_dict(optimizer.state_dict())
    fit(new, optimizer, batches(GAP + 1))
    optimizer.load_state_dict(optimizer.state_dict())
    fit(new, optimizer, batches(GAP, GAP + 1))
    other = case.build(plain.named_parameters())
    fit(plain, other, batches(2 * GAP + 1))
    assert_same_run(new, optimizer, plain, other)


@few_cases
def test_a_scaler_that_skips_leaves_no_trace(case):
    """Accelerate replaces `optimizer.step` for the time of a scaled step."""
    Accelerator(cpu=True)
    scaled, plain = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    optimizer = AcceleratedOptimizer(case.build(scaled.named_parameters()), scaler=scaler)
    other = case.build(plain.named_parameters())
    for step in range(GAP + 2):
        for bad in (True, False):
            for position, param in enumerate(scaled.parameters()):
                param.grad = scaler.get_scale() * gradient(param, step, position)
            scaled.up.weight.grad[2, 3] *= float("inf") if bad else 1.0
            scaler.scale(torch.zeros(()))
            optimizer.step()
            assert optimizer.step_was_skipped == bad
        for position, param in enumerate(plain.parameters()):
            param.grad = gradient(param, step, position)
        other.step()
    assert_same_run(scaled, optimizer.optimizer, plain, other)
