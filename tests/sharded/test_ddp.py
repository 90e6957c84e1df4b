"""DistributedDataParallel: the same on all ranks, less on the wire, updates bucket by bucket."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers.pairwise import in_turn
from helpers.parallel import (
    GAP,
    METHODS,
    Net,
    batch,
    difference,
    loss_of,
    optimizer_of,
    train,
    trained,
    weights,
    wrapped,
)
from helpers.sharded import same_everywhere
from helpers.wire import counted
from lowrank_optim import GaLoreAdamW, projected_all_reduce
from lowrank_optim.parts.projectors import svd

pytestmark = pytest.mark.slow

STEPS = 3 * GAP + 1
WIDE = torch.float64
SMALL = ("galore", "galore-power-rotate", "frugal-none", "galore-rms")
"""Methods that need no more than the projected gradient, and move their subspace now and then."""


def run(method, shares=True, in_backward=None, hook=False):
    """Train under DDP and return the weights, which are the same on all ranks."""
    model = wrapped(Net(WIDE), "ddp")
    group = dist.group.WORLD if shares else None
    optimizer = optimizer_of(model, method, process_group=group)
    if in_backward is not None:
        optimizer.step_in_backward(ddp=model, **in_backward)
    if hook:
        model.register_comm_hook(optimizer, projected_all_reduce)
    train(model, optimizer, range(STEPS))
    found = weights(model)
    assert all(same_everywhere(value) for value in found.values())
    for state in optimizer.state.values():
        assert all(same_everywhere(torch.as_tensor(value)) for value in state.values())
    return found


@pytest.mark.parametrize(
    ("method", "count", "shares"),
    in_turn(METHODS, (2, True), (2, False), (4, True), every=["fira"]),
)
def test_training_equals_that_of_one_process(ranks, method, count, shares):
    reference = trained(method, STEPS, WIDE)
    for found in ranks.run(count, run, method, shares):
        assert difference(found, reference) < 1e-12


def drift(shares):
    """Let each rank's decomposition differ in its last bits, as on unlike machines."""
    exact, calls = svd.eigenvectors, []

    def inexact(square, good):
        calls.append(1)
        return exact(square, good).mul_(1 + 1e-6 * dist.get_rank())

    svd.eigenvectors = inexact
    try:
        model = wrapped(Net(), "ddp")
        group = dist.group.WORLD if shares else None
        train(model, optimizer_of(model, "galore", process_group=group), range(STEPS))
    finally:
        svd.eigenvectors = exact
    return all(same_everywhere(value) for value in weights(model).values()), len(calls)


def test_a_subspace_is_learnt_once_and_shared(ranks):
    """Without a group, machines that round otherwise drift apart: that is what it is for."""
    alone = ranks.run(2, drift, False)
    shared = ranks.run(2, drift, True)
    assert [same for same, _ in alone] == [False, False]
    assert [same for same, _ in shared] == [True, True]
    assert sum(calls for _, calls in shared) == alone[0][1]


@pytest.mark.parametrize("method", SMALL)
def test_projected_gradients_are_enough(ranks, method):
    ordinary = ranks.run(2, run, method)
    projected = ranks.run(2, run, method, True, None, True)
    for ours, theirs in zip(projected, ordinary, strict=True):
        assert difference(ours, theirs) < 1e-12


def bytes_of_a_pass(method, step):
    """Return the bytes averaged in one backward pass, and those of whole gradients."""
    model = wrapped(Net(), "ddp")
    optimizer = optimizer_of(model, method, stagger=False)
    model.register_comm_hook(optimizer, projected_all_reduce)
    train(model, optimizer, range(step))
    loss = loss_of(model, batch(step, dist.get_rank(), 2))
    sent = counted(loss.backward).total("all_reduce")
    whole = sum(4 * param.numel() for param in model.parameters())
    saved = 0
    for group in optimizer.param_groups:
        for param in group["params"] if group["rank"] is not None else []:
            *stack, rows, cols = param.shape
            saved += 4 * torch.Size(stack).numel() * rows * (cols - round(0.4 * cols))
    return sent, whole, saved


@pytest.mark.parametrize("method", SMALL)
def test_bytes_on_the_wire_are_rows_times_rank(ranks, method):
    for sent, whole, saved in ranks.run(2, bytes_of_a_pass, method, GAP + 1):
        assert saved > 0
        assert sent == whole - saved
    moves = ranks.run(2, bytes_of_a_pass, method, GAP)
    learns = method != "frugal-none"
    assert all((sent == whole) == learns or not learns for sent, whole, _ in moves)


def refused(method, message):
    model = wrapped(Net(), "ddp")
    optimizer = optimizer_of(model, method)
    model.register_comm_hook(optimizer, projected_all_reduce)
    with pytest.raises(ValueError, match=message):
        loss_of(model, batch(0)).backward()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fira", "group 0: the update of NormScaled needs the whole gradient"),
        ("apollo", "group 0: the update of GradScaled needs the whole gradient"),
        ("frugal", "group 0: the update of StateFree needs the whole gradient"),
        ("ldadam", "group 0: the update of GeneralErrorFeedback needs the whole gradient"),
        ("galore-length", "group 0: length='adamw' is measured on .* take length=\"rms\" or"),
        ("dct", "group 0: update_proj_gap=1 moves the subspace in every step"),
    ],
)
def test_updates_that_need_more_are_refused(ranks, method, message):
    ranks.run(2, refused, method, message)


@pytest.mark.parametrize("method", tuple(METHODS)[::3])
def test_updates_in_the_backward_pass_are_those_of_step(ranks, method):
    ordinary = ranks.run(2, run, method)
    in_buckets = ranks.run(2, run, method, True, {})
    for ours, theirs in zip(in_buckets, ordinary, strict=True):
        assert difference(ours, theirs) == 0


def accumulated(in_backward):
    """Train with one pass out of two inside no_sync, then without hooks."""
    model = wrapped(Net(WIDE), "ddp")
    optimizer = optimizer_of(model, "fira")
    handle = optimizer.step_in_backward(ddp=model) if in_backward else None
    for step in range(STEPS):
        with model.no_sync():
            loss_of(model, batch(2 * step, dist.get_rank(), 2)).backward()
        loss_of(model, batch(2 * step + 1, dist.get_rank(), 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        assert float(optimizer.grad_norm) > 0
        handle.remove()
    train(model, optimizer, range(2))
    return weights(model)


def test_accumulation_is_that_of_no_sync_and_the_mode_can_be_left(ranks):
    for ours, theirs in zip(
        ranks.run(2, accumulated, True), ranks.run(2, accumulated, False), strict=True
    ):
        assert difference(ours, theirs) == 0


def misuse():
    """What does not go with DDP is said."""
    model = wrapped(Net(), "ddp")
    optimizer = optimizer_of(model, "galore")
    with pytest.raises(ValueError, match=r"inside model.no_sync\(\)"):
        optimizer.step_in_backward(ddp=model, accumulation_steps=2)
    unused = DistributedDataParallel(Net(), find_unused_parameters=True)
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        optimizer.step_in_backward(ddp=unused)
    optimizer.step_in_backward(ddp=model)
    with (
        pytest.raises(RuntimeError, match="clip by the previous norm"),
        optimizer.measure_grad_norm(),
    ):
        pass
    plain = GaLoreAdamW(Net().parameters(), rank=3)
    plain.step_in_backward()
    for param in plain.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="Pass ddp=model for DistributedDataParallel"):
        plain.step()
    assert not plain.state


def test_what_does_not_go_together_is_refused(ranks):
    ranks.run(2, misuse)
