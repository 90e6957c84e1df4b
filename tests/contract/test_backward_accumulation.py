"""Gradients that are accumulated until a step in the backward pass, whole or projected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.cases import CASES, RANK, Model, assert_same, weights
from helpers.layerwise import STEPS, assert_same_state, loss_of, pair, run
from helpers.pairwise import in_turn
from lowrank_optim import DCTAdamW, FrugalAdamW, GaLoreAdamW, LowRank

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("mode", ["ordinary", "in backward", "full", "projected"])
def test_memory_of_gradients_is_what_is_documented(mode):
    """Bytes of gradients and of their projected sums at the worst moment of a step."""
    rank, width, depth, head = 5, 24, 4, 31
    model = nn.Sequential(
        *(nn.Linear(width, width, bias=False) for _ in range(depth)),
        nn.Linear(width, head, bias=False),
    )
    matrices = list(model.parameters())[:depth]
    optimizer = GaLoreAdamW(
        [{"params": matrices, "rank": rank}, {"params": model[-1].parameters()}]
    )
    peak = 0

    def watch(_):
        nonlocal peak
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        sums = (
            optimizer._session.in_backward._sums.values() if optimizer._session.in_backward else ()
        )
        peak = max(peak, sum(x.numel() * x.element_size() for x in (*grads, *sums)))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(watch)
    passes = 1 if mode == "in backward" else 3
    if mode != "ordinary":
        accumulate = "full" if mode == "in backward" else mode
        optimizer.step_in_backward(accumulation_steps=passes, accumulate=accumulate)
    for number in range(2 * passes):
        model(torch.randn(3, width)).square().sum().backward()
        if number % passes == passes - 1:
            optimizer.step()
            optimizer.zero_grad()
    matrix, last = 4 * width * width, 4 * width * head
    assert (
        peak
        == {
            "ordinary": depth * matrix + last,
            "in backward": max(matrix, last),
            "full": depth * matrix + last,
            "projected": depth * 4 * width * rank + last + matrix,
        }[mode]
    )


@pytest.mark.parametrize(
    ("case", "said"), in_turn(CASES, "number", "function", every=CASES[:1]), ids=str
)
def test_whole_gradients_accumulate_as_without(case, said):
    number = 0

    def last():
        return number == 2

    (model, ordinary), (other, layerwise) = pair(
        case, accumulation_steps=3 if said == "number" else last
    )
    run(model, ordinary, passes=3)
    for step in range(STEPS):
        for number in range(3):
            loss_of(other, step + 100 * number).backward()
            freed = all(param.grad is None for param in other.parameters())
            assert freed == (number == 2)
        layerwise.step()
    assert_same(weights(model), weights(other))
    assert_same_state(ordinary, layerwise)


def test_a_step_after_fewer_passes_uses_what_there_is():
    """The last batches of an epoch may be fewer: step() does what the backward pass did not."""
    for accumulate in ("full", "projected"):
        (model, ordinary), (other, layerwise) = pair(
            CASES[0], accumulation_steps=3, accumulate=accumulate
        )
        passes = 2 if accumulate == "full" else 1
        run(model, ordinary, passes=passes)
        run(other, layerwise, passes=passes)
        close = {"rtol": 0, "atol": 0 if accumulate == "full" else 1e-5}
        for name, value in weights(model).items():
            torch.testing.assert_close(weights(other)[name], value, **close)
        assert layerwise.state[other.tall]["step"] == STEPS


@pytest.mark.parametrize("accumulate", ["full", "projected"])
def test_what_step_uses_is_freed_as_well(accumulate):
    """Without zero_grad(), as loops in this mode are written: nothing is used twice."""
    results = []
    for layerwise in (False, True):
        model = Model()
        optimizer = LowRank([model.tall, model.square], rank=RANK, projector="random")
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=2, accumulate=accumulate)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": [model.wide, model.vector]})
            for number in range(1 if step == 1 else 2):
                loss_of(model, step + 100 * number).backward()
            optimizer.step()
            for group in optimizer.param_groups if layerwise else ():
                assert all(param.grad is None for param in group["params"])
            if not layerwise:
                optimizer.zero_grad()
        results.append(weights(model))
    near = {"rtol": 0, "atol": 0} if accumulate == "full" else {"rtol": 1e-5, "atol": 1e-6}
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, **near)


DROPPING = [
    (LowRank, {"projector": "random"}),
    (LowRank, {"projector": "columns", "on_refresh": "reset"}),
    (FrugalAdamW, {"state_free": "none"}),
    (LowRank, {"projector": "random", "rule": "lion"}),
]


@pytest.mark.parametrize(("factory", "settings"), DROPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_gradients_accumulate_to_rounding(factory, settings, dtype):
    """Where the subspace does not come from the gradient, to rounding and at refreshes too."""
    results = []
    for layerwise in (False, True):
        model = Model(dtype)
        optimizer = factory(model.parameters(), lr=1e-3, rank=RANK, update_proj_gap=3, **settings)
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=3, accumulate="projected")
        run(model, optimizer, passes=3)
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factory", [GaLoreAdamW, DCTAdamW])
@pytest.mark.parametrize("projector", ["svd", "power", "dct"])
def test_projected_accumulation_of_proportional_gradients(factory, projector):
    """Then the first pass teaches the same subspace as all of them."""
    if factory is DCTAdamW and projector != "dct":
        projector = "svd"
    shares = (0.5, 0.25, 0.25)
    results = []
    for layerwise in (False, True):
        model = Model(torch.float64)
        optimizer = factory(
            model.parameters(), lr=1e-2, rank=RANK, update_proj_gap=3, projector=projector
        )
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=3, accumulate="projected")
        for step in range(STEPS):
            for share in shares:
                loss_of(model, step, share).backward()
                if layerwise and share == 0.5:
                    kept = {name for name, p in model.named_parameters() if p.grad is not None}
                    assert kept == {"narrow", "vector", "scalar", "empty"}
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-6)


def test_the_first_pass_teaches_the_subspace():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
    run(model, optimizer, range(1), passes=2)
    alone = Model()
    first = GaLoreAdamW(alone.parameters(), rank=RANK)
    run(alone, first, range(1))
    assert torch.equal(optimizer.state[model.tall]["basis"], first.state[alone.tall]["basis"])


def test_zero_grad_forgets_what_was_accumulated():
    for accumulate in ("full", "projected"):
        _, (other, optimizer) = pair(CASES[0], accumulation_steps=2, accumulate=accumulate)
        loss_of(other, 7).backward()
        optimizer.zero_grad()
        before = weights(other)
        optimizer.step()
        assert_same(weights(other), before)
        run(other, optimizer, range(1), passes=2)
        assert optimizer.state[other.tall]["step"] == 1


def test_autocast_does_not_reach_what_is_accumulated():
    """A backward pass inside the context, as many write it, computes as one outside."""
    states = []
    for inside in (False, True):
        model = Model()
        optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
        optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
        for number in range(2):
            loss = loss_of(model, number)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                loss.backward()
        optimizer.step()
        states.append(optimizer)
    assert_same_state(*states)


def test_a_group_that_needs_whole_gradients_cannot_join_projected_accumulation():
    model = Model()
    optimizer = LowRank([model.tall], rank=RANK)
    optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
    with pytest.raises(ValueError, match="NormScaled in group 1 of LowRank"):
        optimizer.add_param_group({"params": [model.wide], "residual": "norm_scaled"})
    assert len(optimizer.param_groups) == 1
