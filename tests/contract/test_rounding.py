"""bf16 weights that are rounded stochastically: unbiased in every mode, a function of the seed.

The exact value of a step is that of float32 weights that start from the same bf16 values and get
the same bf16 gradients. A parameter is made of many copies of a small one, along an axis that is
not projected: all copies have the same exact value, and each has noise of its own.
"""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch
from torch import nn

from helpers.cases import CASES, Case, assert_same, weights
from helpers.pairwise import in_turn
from lowrank_optim import ApolloAdamW, DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW

PRESETS = [
    Case("galore", GaLoreAdamW),
    Case("dct", DCTAdamW),
    Case("fira", FiraAdamW, {"projector": "power"}),
    Case("frugal", FrugalAdamW),
    Case("apollo", ApolloAdamW),
]
SMALL = [
    Case("galore-8bit", GaLoreAdamW, {"state_dtype": "8bit", "projector": "power"}),
    Case("apollo-8bit", ApolloAdamW, {"state_dtype": "8bit"}),
    Case("frugal-bf16-state", FrugalAdamW, {"state_dtype": torch.bfloat16}),
]
OTHERS = [case for case in CASES if case.name in ("frugal-blocks", "lion-state-free", "maximize")]
MODES = ("step", "step_in_backward", "step_param")
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "tall": ((13, 7), 0),
    "wide": ((5, 11), 1),
    "stack": ((3, 8, 5), 1),
    "conv": ((6, 2, 3, 3), 0),
    "narrow": ((17, 2), 0),
    "vector": ((11,), 0),
}
"""Shapes of one copy, and the axis along which copies are put."""


def values(shape, seed):
    """Random bf16 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Copies(nn.Module):
    """Some parameters of `SHAPES`, each of many equal copies."""

    def __init__(self, dtype, copies, names):
        super().__init__()
        self.copies = copies
        for name in names:
            self.register_parameter(name, nn.Parameter(self.draw(name, 0).to(dtype)))

    def draw(self, name, step):
        """The first value of a parameter, or its gradient in a step from 1: equal copies."""
        shape, axis = SHAPES[name]
        value = values(shape, 100 * step + list(SHAPES).index(name))
        return value.repeat([self.copies if i == axis else 1 for i in range(value.ndim)])


def give(param, grad):
    """Set a bf16 gradient; torch refuses one to a float32 parameter, but keeps one set before."""
    weight = param.data
    param.data = weight.to(grad.dtype)
    param.grad = grad
    param.data = weight


def take_step(model, optimizer, step, mode):
    """Take one step, from 1, in a mode."""
    grads = {n: model.draw(n, step).to(p.device) for n, p in model.named_parameters()}
    if mode == "step_in_backward":
        losses = [(param * grads[name]).sum() for name, param in model.named_parameters()]
        torch.stack(losses).sum().backward()
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()
        return
    for name, param in model.named_parameters():
        give(param, grads[name])
        if mode == "step_param":
            optimizer.step_param(param)
            param.grad = None
    if mode == "step":
        optimizer.step()


def one_step(case, seed, mode, dtype, copies, names=SHAPES, device="cpu", before=2, **changes):
    """Fill the moments in some steps at a rate of 0, then take one step that counts."""
    model = Copies(dtype, copies, names).to(device)
    start = weights(model)
    optimizer = case.build(
        model.parameters(), seed=seed, stochastic_rounding=True, **{"impl": "eager", **changes}
    )
    if mode == "step_in_backward":
        optimizer.step_in_backward()
    (group,) = optimizer.param_groups
    rate, group["lr"] = group["lr"], 0.0
    for step in range(before):
        take_step(model, optimizer, step + 1, mode)
    assert_same(weights(model), start)
    group["lr"] = rate
    take_step(model, optimizer, before + 1, mode)
    return weights(model)


def neighbours(exact):
    """The bf16 values next to float32 values, towards zero and away from it, in float32."""
    inner = exact.view(torch.int32) & -(1 << 16)
    return inner.view(torch.float32), (inner + (1 << 16)).view(torch.float32)


def assert_unbiased(case, seeds, copies, mode="step", **changes):
    """Every draw is a neighbour of the exact value, and their mean is the exact value.

    The deviation of a draw is at most half the distance of the neighbours.
    """
    errors = {}
    for seed in range(seeds):
        drawn = one_step(case, seed, mode, torch.bfloat16, copies, **changes)
        exact = one_step(case, seed, "step", torch.float32, copies, **changes)
        for name, value in exact.items():
            inner, outer = neighbours(value)
            found = drawn[name].float()
            assert ((found == inner) | (found == outer)).all(), name
            shape, axis = SHAPES[name]
            error = (found.double() - value.double()) / (outer - inner).abs()
            error = error.unflatten(axis, (copies, shape[axis])).movedim(axis, 0)
            errors.setdefault(name, []).append(error)
    for name, found in errors.items():
        worst = torch.cat(found).mean(0).abs().max()
        assert float(worst) < 5 * 0.5 / (seeds * copies) ** 0.5, name
    every = torch.cat([error.flatten() for found in errors.values() for error in found])
    assert abs(float(every.mean())) < 5 * 0.5 / every.numel() ** 0.5


@pytest.mark.parametrize(
    ("case", "mode"), in_turn([*PRESETS, *OTHERS], *MODES, every=PRESETS[:1]), ids=str
)
def test_a_step_is_unbiased(case, mode):
    assert_unbiased(case, seeds=4, copies=256, mode=mode)


@pytest.mark.parametrize(("case", "mode"), in_turn(SMALL, *MODES), ids=str)
def test_a_step_with_small_states_is_unbiased(case, mode):
    """128 copies of the narrow matrix are enough for 8 bits."""
    names = ("tall", "wide", "narrow", "vector")
    assert_unbiased(case, seeds=2, copies=128, mode=mode, names=names, before=1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="kernels need triton")
@pytest.mark.parametrize("case", [PRESETS[0], PRESETS[-1]], ids=str)
def test_a_step_of_kernels_is_unbiased(case, device):
    """Few copies, and no step before: the interpreter is slow. For small states see test_fused."""
    few = {"seeds": 2, "copies": 16, "names": ("tall", "vector"), "before": 0}
    assert_unbiased(case, device=device, impl="triton", **few)


@pytest.mark.parametrize("case", [*PRESETS, SMALL[0]], ids=str)
def test_draws_are_a_function_of_the_seed(case):
    """Of torch's own random numbers none is used."""
    drawn = []
    for seed, outside in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        drawn.append(one_step(case, seed, "step", torch.bfloat16, 8))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(drawn[0], drawn[1])
    for name, value in drawn[2].items():
        assert not torch.equal(value, drawn[0][name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*PRESETS, *SMALL], ids=str)
def test_a_resumed_run_goes_on_with_the_draws_of_its_seed(case, mode):
    whole = Copies(torch.bfloat16, 8, SHAPES)
    optimizer = case.build(whole.parameters(), stochastic_rounding=True, seed=5)
    file = io.BytesIO()
    for step in range(1, 7):
        take_step(whole, optimizer, step, "step")
        if step == 3:
            state = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert [type(group["seed"]) for group in saved["optimizer"]["param_groups"]] == [int]

    resumed = Copies(torch.bfloat16, 8, SHAPES)
    resumed.load_state_dict(saved["model"])
    optimizer = case.build(resumed.parameters(), stochastic_rounding=True, seed=6)
    optimizer.load_state_dict(saved["optimizer"])
    if mode == "step_in_backward":
        optimizer.step_in_backward()
    for step in range(4, 7):
        take_step(resumed, optimizer, step, mode)
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("case", PRESETS, ids=str)
def test_updates_below_the_resolution_count(case):
    """100 steps at 1e-5 of weights as they are in language models: to nearest, none moves.

    Weights next to zero are left out, for there bf16 is fine enough. Draws of different steps are
    independent, so that deviations grow with the root of the steps.
    """
    steps = 100
    rng = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(160, 40, generator=rng)
    start = (start.sign() * start.abs().clamp(min=0.016)).bfloat16()
    grad = torch.randn(start.shape, generator=rng).sign().bfloat16()
    settings = {"lr": 1e-5, "rank": 20, "scale": 1.0, "update_proj_gap": steps}
    moved = {}
    for weight, rounding in (("fp32", False), ("nearest", False), ("stochastic", True)):
        values = start.float() if weight == "fp32" else start
        matrix, vector = nn.Parameter(values.clone()), nn.Parameter(values.flatten().clone())
        optimizer = case.build([matrix, vector], stochastic_rounding=rounding, **settings)
        give(matrix, grad)
        give(vector, grad.flatten())
        for _ in range(steps):
            optimizer.step()
        ends = torch.stack([matrix.detach().flatten(), vector.detach()]).double()
        moved[weight] = ends - start.flatten().double()
    exact, drawn = moved["fp32"], moved["stochastic"]
    assert torch.count_nonzero(exact) > 0.99 * exact.numel()
    assert torch.count_nonzero(moved["nearest"]) == 0
    inner, outer = neighbours(start.float().flatten())
    deviation = 0.5 * steps**0.5 * (outer - inner).abs().double()
    for true, found in zip(exact, drawn, strict=True):
        size = float(true.square().sum())
        share = float((true * found).sum()) / size
        bound = 5 * float((true * deviation).norm()) / size
        assert abs(share - 1) < bound < 0.2
        assert float((found - true).norm()) < float(deviation.norm())
