"""torch.compile of a step, of a training step and of the model, and other wrappers of modules."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from helpers.cases import GAP, RANK
from helpers.loops import FEW, Net, assert_same_run, batches, fit, halving, loss_of, trained
from lowrank_optim import param_groups

STEPS = 2 * GAP + 2
few_cases = pytest.mark.parametrize("case", FEW[1::4], ids=str)


def assert_as_without_compiling(case, model, optimizer):
    """Assert that a run is that of the plain loop with a halving learning rate, to the bit."""
    plain = Net()
    other = case.build(plain.named_parameters())
    fit(plain, other, batches(STEPS), scheduler=halving(other))
    assert_same_run(model, optimizer, plain, other)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_wrappers_do_not_hide_what_a_parameter_is(wrap):
    """They put a name of their own into those of the parameters."""

    def counts(model):
        return [len(group["params"]) for group in param_groups(model, rank=RANK)]

    model, wrapped = Net(), Net()
    for name in ("embed", "up", "norm", "head"):
        setattr(wrapped, name, wrap(getattr(wrapped, name)))
    assert counts(wrapped) == counts(wrap(wrapped)) == counts(wrap(Net())) == counts(model)


@pytest.fixture
def no_recompiling():
    """Start with nothing compiled; what was compiled once may not be compiled again."""
    torch.compiler.reset()

    def start():
        torch.compiler.set_stance("fail_on_recompile")

    yield start
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@few_cases
def test_a_compiled_step_is_the_step(case, no_recompiling):
    """`torch.compile(optimizer.step)`: right numbers, and compiled once for all rates."""
    model = Net()
    optimizer = case.build(model.named_parameters())
    schedule = halving(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for number, batch in enumerate(batches(STEPS)):
        loss_of(model, batch).backward()
        step()
        optimizer.zero_grad()
        schedule.step()
        if number == 0:
            no_recompiling()
    assert_as_without_compiling(case, model, optimizer)


@few_cases
def test_a_compiled_training_step_with_the_optimizer_in_it(case, no_recompiling):
    model = Net()
    optimizer = case.build(model.named_parameters())
    schedule = halving(optimizer)

    @torch.compile(backend="eager")
    def train(batch):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for number, batch in enumerate(batches(STEPS)):
        train(batch)
        schedule.step()
        if number == 0:
            no_recompiling()
    assert_as_without_compiling(case, model, optimizer)


@few_cases
def test_a_compiled_model_stays_compiled_inside_a_closure(case, no_recompiling):
    """Not compiling the step must not reach what it calls."""
    calls = []

    def backend(graph, _):
        return lambda *args: calls.append(graph) or graph.forward(*args)

    model = Net()
    optimizer = case.build(model.named_parameters())
    compiled = torch.compile(model, backend=backend)
    for number, batch in enumerate(batches(STEPS)):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(compiled, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        if number == 0:
            no_recompiling()
    assert len(calls) == STEPS
    assert_same_run(model, optimizer, *trained(case, STEPS))
