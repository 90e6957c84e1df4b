"""PyTorch's own sharding: fully_shard, hybrid meshes, tensor parallelism; updates in its hooks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from helpers.pairwise import crossed, in_turn
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
    wrapped,
)
from helpers.parallel import weights as weights_of
from helpers.sharded import same_everywhere

pytestmark = pytest.mark.slow

STEPS = 3 * GAP + 1
WIDE = torch.float64
FEW = ["galore-power-rotate", "dct", "fira", "fira-8bit"]


def run(method, kind, dtype=WIDE, in_backward=None, steps=STEPS):
    """Train a wrapped model; return its weights, and the norm of the last gradients."""
    model = wrapped(Net(dtype), kind)
    optimizer = optimizer_of(model, method)
    if in_backward is not None:
        optimizer.step_in_backward(**in_backward)
    train(model, optimizer, range(steps))
    found = weights_of(model)
    assert all(same_everywhere(value) for value in found.values())
    assert any(isinstance(param, DTensor) for param in model.parameters())
    return found, None if optimizer.grad_norm is None else float(optimizer.grad_norm)


@pytest.mark.parametrize(
    ("method", "count", "kind"),
    in_turn(METHODS, (2, "fsdp"), (4, "fsdp"), (4, "hybrid"), every=["fira"]),
)
def test_training_equals_that_of_one_process(ranks, method, count, kind):
    reference = trained(method, STEPS, WIDE)
    for found, _ in ranks.run(count, run, method, kind):
        assert difference(found, reference) < 1e-12


def clipped_by_hand(method, max_norm):
    """Train in ordinary steps, clipped by the larger of the norm before and the gradient's own."""
    model = wrapped(Net(WIDE), "fsdp")
    optimizer = optimizer_of(model, method)
    before = 0.0
    for step in range(STEPS):
        loss_of(model, batch(step, dist.get_rank(), dist.get_world_size())).backward()
        norms = [param.grad.full_tensor().norm() for param in model.parameters()]
        for param, norm in zip(model.parameters(), norms, strict=True):
            param.grad.mul_(min(1.0, max_norm / (max(before, float(norm)) + 1e-6)))
        before = float(torch.stack(norms).norm())
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), before


@pytest.mark.parametrize("method", ["galore-power-rotate", "fira-8bit"])
def test_updates_in_the_backward_pass_are_those_of_step(ranks, method):
    """To the bit, on both ranks; with clipping, to rounding."""
    ordinary = ranks.run(2, run, method, "fsdp")
    in_hooks = ranks.run(2, run, method, "fsdp", WIDE, {})
    for (ours, norm), (theirs, _) in zip(in_hooks, ordinary, strict=True):
        assert difference(ours, theirs) == 0
        assert norm > 0
    by_hand = ranks.run(2, clipped_by_hand, method, 0.3)
    clipped = ranks.run(2, run, method, "fsdp", WIDE, {"max_norm": 0.3})
    for (ours, norm), (theirs, expected) in zip(clipped, by_hand, strict=True):
        assert difference(ours, theirs) < 1e-12
        assert abs(norm - expected) < 1e-12 * expected
    assert difference(clipped[0][0], in_hooks[0][0]) > 1e-6


def watch_gradients():
    """Count the gradients that are there when each one arrives."""
    model = wrapped(Net(), "fsdp")
    optimizer = optimizer_of(model, "galore")
    optimizer.step_in_backward()
    params, most = list(model.parameters()), []
    for param in params:
        param.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(other.grad is not None for other in params))
        )
    train(model, optimizer, range(2))
    assert all(param.grad is None for param in params)
    assert len(most) == 2 * len(params)
    return max(most)


def test_gradients_of_shards_are_freed_as_they_are_used(ranks):
    assert ranks.run(2, watch_gradients) == [0, 0]


def accumulated(method, accumulate):
    """Train with two backward passes a step."""
    model = wrapped(Net(WIDE), "fsdp")
    optimizer = optimizer_of(model, method)
    if accumulate is not None:
        optimizer.step_in_backward(accumulation_steps=2, accumulate=accumulate)
    for step in range(STEPS):
        for part in (0, 1):
            words = batch(2 * step + part, dist.get_rank(), dist.get_world_size())
            (loss_of(model, words) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize(("method", "accumulate"), [("fira", "full"), ("frugal-none", "projected")])
def test_accumulation_in_the_backward_pass(ranks, method, accumulate):
    ordinary = ranks.run(2, accumulated, method, None)
    for ours, theirs in zip(ranks.run(2, accumulated, method, accumulate), ordinary, strict=True):
        assert difference(ours, theirs) < (1e-12 if accumulate == "projected" else 1e-300)


def tensor_parallel(method, sharded, in_backward):
    """Train with tensor parallelism, and FSDP2 around it."""
    model = Net(WIDE, 16)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if sharded:
            fully_shard(block, mesh=mesh["dp"])
    if sharded:
        fully_shard(model, mesh=mesh["dp"])
    optimizer = optimizer_of(model, method)
    if in_backward:
        optimizer.step_in_backward()
    place, count = (mesh.get_local_rank("dp"), mesh.size(0)) if sharded else (0, 1)
    for step in range(STEPS):
        loss_of(model, batch(step, place, count)).backward()
        optimizer.step()
        optimizer.zero_grad()
    column = model.blocks[0][2].weight
    assert [p.dim for p in column.placements] == ([0, 1] if sharded else [1])
    return weights_of(model)


@crossed(method=FEW, sharded=[False, True], in_backward=[False, True])
def test_tensor_parallelism_alone_and_with_fsdp2(ranks, method, sharded, in_backward):
    model = Net(WIDE, 16)
    train(model, optimizer_of(model, method), range(STEPS))
    for found in ranks.run(4 if sharded else 2, tensor_parallel, method, sharded, in_backward):
        assert difference(found, weights_of(model)) < 1e-12


def synchronised_once(method, in_backward):
    """Train with two backward passes a step, of which FSDP2 reduces the gradients in the last."""
    model = wrapped(Net(WIDE), "fsdp")
    optimizer = optimizer_of(model, method)
    if in_backward:
        optimizer.step_in_backward()
    for step in range(STEPS):
        for part in (0, 1):
            model.set_requires_gradient_sync(part == 1)
            words = batch(2 * step + part, dist.get_rank(), dist.get_world_size())
            (loss_of(model, words) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def test_passes_without_synchronisation_do_not_count(ranks):
    for ours, theirs in zip(
        ranks.run(2, synchronised_once, "fira", True),
        ranks.run(2, synchronised_once, "fira", False),
        strict=True,
    ):
        assert difference(ours, theirs) == 0
