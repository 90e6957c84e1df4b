"""Kernels of the length of updates, against their references and in whole steps.

Sums are made in another order, and products of bfloat16 are summed in float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cases import gradient
from helpers.kernels import Small, assert_alike, bases, columns, draw, matrices
from helpers.pairwise import crossed
from lowrank_optim import (
    ApolloAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    Update,
    functional,
)
from lowrank_optim.engine.length import sampled
from lowrank_optim.parts.length import Sampled
from lowrank_optim.parts.types import Job, Site
from lowrank_optim.sharding.layout import Layout

pytest.importorskip("triton", reason="kernels need triton")
from lowrank_optim import kernels

BETAS, EPS = (0.9, 0.99), 1e-8
LAYOUTS = ("straight", "transposed", "strided")
pytestmark = pytest.mark.usefixtures("poisoned")


SAMPLES = {
    "one a row": ((1201, 7), 1),
    "few": ((33, 45), 5),
    "whole rows": ((3, 31), 31),
    "stack": ((2, 3, 130, 9), 2),
    "one column": ((5, 1), 1),
}
"""Shape of a gradient, and the entries a row."""


@crossed(
    size=SAMPLES, layout=LAYOUTS, dtype=[torch.float32, torch.bfloat16, torch.float16],
    counted=[False, True],
)  # fmt: skip
def test_sample_moments(size, layout, dtype, counted, device):
    shape, width = SAMPLES[size]
    *batch, rows, cols = shape
    grads = matrices(3, rows, cols, dtype, device, layout, batch=batch)
    held = (*shape[:-1], width)
    first = [draw(held, torch.float32, device, 40 + k, 0.1) for k in range(3)]
    second = [draw(held, torch.float32, device, 50 + k, 0.1).square() for k in range(3)]
    other = [[x.clone() for x in some] for some in (first, second)]
    counts = [torch.tensor(float(4 + k), device=device) for k in range(3)] if counted else [4] * 3
    arguments = ([0, (1 << 32) + 5, 12345], counts, *BETAS, EPS)
    found = kernels.sample_moments(grads, first, second, *arguments)
    wanted = functional.sample_moments(grads, *other, *arguments)
    assert found.shape == wanted.shape == (3, *shape[:-2])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for mine, theirs in zip((first, second), other, strict=True):
        for one, two in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_what_is_beyond_a_sample_is_no_part_of_the_sum(device):
    """Without an eps, what is not there has no direction."""
    grads = matrices(1, 130, 9, torch.float32, device, "straight")
    moments = [[torch.zeros(130, 1, device=device)] for _ in range(2)]
    found = kernels.sample_moments(grads, *moments, [0], [1], *BETAS, 0.0)
    assert found.item() == pytest.approx(130, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_entry_that_is_not_finite_counts_as_nothing(bad, device):
    """Its moments are spoiled, as AdamW's are by nan; the length of its matrix is not."""
    (grad,) = matrices(1, 130, 9, torch.float32, device, "straight")
    bad_row = 7
    grad[bad_row] = bad
    found = []
    for module in (kernels, functional):
        moments = [[torch.zeros(130, 2, device=device)] for _ in range(2)]
        found.append(module.sample_moments([grad], *moments, [0], [1], *BETAS, EPS).item())
        assert moments[0][0][bad_row].isnan().all() == math.isnan(bad)
    assert found == pytest.approx([129 * 2] * 2, rel=1e-4)


def test_a_sample_of_no_rows_adds_nothing(device):
    """A process may hold no rows of a matrix."""
    grads = [torch.ones(0, 9, device=device)]
    moments = [[torch.zeros(0, 2, device=device)] for _ in range(2)]
    found = kernels.sample_moments(grads, *moments, [0], [1], *BETAS, EPS)
    assert found.tolist() == [0.0]


def test_samples_of_other_widths_have_launches_of_their_own(monkeypatch, device):
    """Shards of 47 rows, of matrices of 93 and of 94, have 12 and 11 entries a row."""
    widths, jobs = [], []
    real = kernels.sample_moments

    def noted(grads, *rest):
        widths.append([moment.shape[-1] for moment in rest[0]])
        return real(grads, *rest)

    monkeypatch.setattr(kernels, "sample_moments", noted)
    for place, width in enumerate((12, 11, 12)):
        grad = draw((47, 30), torch.float32, device, place)
        state = {key: torch.zeros(47, width, device=device) for key in Sampled.keys}
        state["step"] = torch.tensor(0.0)
        site = Site(3, 30, torch.float32, grad.device, ops=kernels, layout=Layout((47, 30)))
        jobs.append(Job(grad, grad, state, site, place, site.layout, grad))
    found = sampled(jobs, {"capturable": False, "betas": BETAS, "eps": EPS}, None)
    assert widths == [[12, 12], [11]]
    sums = [job.sampled.item() for job in found]
    assert sums == pytest.approx([47 * 12, 47 * 11, 47 * 12], rel=1e-4)


def test_counts_of_one_launch_of_samples_are_alike(device):
    grads = matrices(2, 9, 7, torch.float32, device, "straight")
    moments = [[torch.zeros(9, 2, device=device) for _ in grads] for _ in range(2)]
    with pytest.raises(ValueError, match="same count"):
        kernels.sample_moments(grads, *moments, [0, 0], [1, 2], *BETAS, EPS)


SIZES = {"tall": (70, 37, 5), "wide": (45, 133, 19), "narrow rank": (16, 130, 2)}
SIGNS = {
    "both": Update(direction=0.75, sign=0.5),
    "sign alone": Update(direction=0.0, sign=0.5),
}


def drawn(size, kind, dtype, layout, device):
    """Gradients, factors, their products and some directions of two matrices."""
    rows, cols, rank = SIZES[size]
    grads = matrices(2, rows, cols, dtype, device, layout)
    if kind == "basis":
        factors = bases(2, cols, rank, dtype, device)
        wide = [factor.float() for factor in factors]
    else:
        factors = wide = columns(2, cols, rank, device)
    pairs = zip(grads, wide, strict=True)
    low = torch.stack([functional.down(grad.float(), f, torch.float32) for grad, f in pairs])
    direction = draw(low.shape, dtype, device, 5)
    return grads, factors, wide, low.to(dtype), direction


@crossed(
    size=SIZES, kind=["basis", "columns"], dtype=[torch.float32, torch.bfloat16, torch.float16],
    layout=LAYOUTS, name=SIGNS,
)  # fmt: skip
def test_sign_squares(size, kind, dtype, layout, name, device):
    grads, factors, wide, low, direction = drawn(size, kind, dtype, layout, device)
    for grad in grads:
        grad[1] = 0  # a row without a sign
    low[:, 1] = 0
    update = SIGNS[name]
    found = kernels.sign_squares(grads, factors, low, direction, update)
    whole = [grad.float() for grad in grads]
    wanted = functional.sign_squares(whole, wide, low.float(), direction.float(), update)
    assert found.shape == (2,)
    assert found.dtype == torch.float32
    # Where almost nothing is dropped, a sign may differ: one of some thousand.
    torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=0)


UPDATES = {
    "drop": Update(direction=0.25),
    "fira": Update(direction=0.25, low=-0.3, grad=0.3),
    "sign": Update(direction=1.0, sign=0.5),
    "apollo": Update(grad=0.7),
}


@crossed(
    name=UPDATES, kind=["basis", "columns"], dtype=[torch.float32, torch.bfloat16],
    layout=LAYOUTS, rated=[False, True],
)  # fmt: skip
def test_lift_write_stretches_each_matrix(name, kind, dtype, layout, rated, device):
    """A length of each matrix is a factor of its step, to a rounding, and not of its decay."""
    grads, factors, _, low, direction = drawn("tall", kind, dtype, layout, device)
    params = matrices(2, *grads[0].shape, torch.float32, device, layout, 30)
    lengths = torch.tensor([0.125, 3.0], device=device)
    rate = torch.tensor(-0.1, device=device) if rated else -0.1
    before = [param.clone() for param in params]
    kernels.lift_write(
        params, grads, factors, low, direction.clone(), UPDATES[name], rate, 0.9, None, lengths
    )
    for k, length in enumerate((0.125, 3.0)):
        other = [before[k].clone()]
        some = low[k : k + 1], direction[k : k + 1].clone()
        kernels.lift_write(
            other, grads[k : k + 1], factors[k : k + 1], *some, UPDATES[name], -0.1 * length, 0.9
        )
        torch.testing.assert_close(params[k], other[0], rtol=1e-6, atol=1e-6)


CASES = {
    "galore": (GaLoreAdamW, {"projector": "svd"}),
    "fira": (FiraAdamW, {"projector": "svd"}),
    "apollo": (ApolloAdamW, {"projector": "svd"}),
    "frugal": (FrugalAdamW, {}),
    "frugal-power": (FrugalAdamW, {"projector": "power"}),
    "frugal-sgd": (FrugalAdamW, {"projector": "power", "state_free": "sgd"}),
    "lowrank": (LowRankAdamW, {}),
}
"""Methods of which kernels do the steps."""


def trained(name, impl, device, dtype=torch.float32, steps=5, few=True, **changes):
    """Return a model after some steps, two refreshes among them, and its optimizer."""
    factory, settings = CASES[name]
    model = Small(dtype, few).to(device)
    settings = {"lr": 1e-2, "update_proj_gap": 3, **settings, **changes}
    optimizer = factory(model.groups(3), impl=impl, **settings)
    for step in range(steps):
        for position, param in enumerate(model.parameters()):
            param.grad = gradient(param.cpu(), step, position).to(device)
        optimizer.step()
    return model, optimizer


@pytest.mark.slow
@pytest.mark.usefixtures("tall_tiles")
@crossed(name=CASES, length=["rms", "adamw"], capturable=[False, True])
def test_steps_of_a_length_are_those_of_plain_torch(name, length, capturable, device):
    changes = {"length": length, "capturable": capturable, "stagger": False}
    fused, optimizer = trained(name, "triton", device, **changes)
    plain, _ = trained(name, "eager", device, **changes)
    assert "kernels" in optimizer.summary()
    assert_alike(fused, plain, Small(torch.float32, True), 1e-3, 1e-4)
    if length == "adamw":
        for param in fused.parameters():
            held = optimizer.state[param].get("sample.exp_avg")
            assert held is None or held.count_nonzero() == held.numel()


@pytest.mark.slow
@pytest.mark.usefixtures("tall_tiles")
@pytest.mark.parametrize("name", ["galore", "frugal-power"])
def test_steps_with_small_states_and_weights(name, device):
    changes = {"length": "adamw", "state_dtype": "8bit", "dtype": torch.bfloat16, "lr": 5e-2}
    fused, _ = trained(name, "triton", device, **changes)
    plain, _ = trained(name, "eager", device, **changes)
    assert_alike(fused, plain, Small(torch.bfloat16, True), 3.0, 0.15)


def test_a_length_goes_on_the_way_of_the_direction(device):
    """A step of "rms" with kernels has the length that it is said to have."""
    for name in CASES:
        weights = draw((21, 9), torch.float32, device, 1)
        param = nn.Parameter(weights.clone())
        factory, settings = CASES[name]
        optimizer = factory(
            [param], rank=3, lr=1e-2, weight_decay=0.0, length="rms", scale=1.0, impl="triton",
            **settings,
        )  # fmt: skip
        param.grad = draw((21, 9), torch.float32, device, 2)
        optimizer.step()
        norm = (param.detach() - weights).norm().item()
        assert norm == pytest.approx(1e-2 * 0.2 * math.sqrt(21 * 9), rel=1e-4), name


class Reads(TorchDispatchMode):
    """Counts the values of tensors that the host looks at: each is a wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_no_number_for_a_length(name, device):
    counts = []
    for length in ("published", "adamw"):
        param = nn.Parameter(draw((12, 7), torch.float32, device, 1))
        factory, settings = CASES[name]
        optimizer = factory(
            [param], rank=3, length=length, impl="triton", capturable=True, **settings
        )
        param.grad = draw((12, 7), torch.float32, device, 2)
        optimizer.step()
        with Reads() as reads:
            optimizer.step()
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_matrices_share_the_launches_of_a_length(monkeypatch, device):
    """One launch for the samples, one for the norms where there is a sign; no other pass over G."""
    calls = []
    for name in ("project_moments", "sample_moments", "sign_squares", "lift_write"):
        real = getattr(kernels, name)

        def noted(*args, name=name, real=real):
            asked = args[9].norms if name == "project_moments" else None
            calls.append((name, len(args[0]), asked))
            return real(*args)

        monkeypatch.setattr(kernels, name, noted)
    for name, norms in (("galore", False), ("frugal-sgd", True), ("lowrank", False)):
        params = [nn.Parameter(draw((12, 7), torch.float32, device, k)) for k in range(3)]
        factory, settings = CASES[name]
        optimizer = factory(params, rank=3, length="adamw", impl="triton", **settings)
        for param in params:
            param.grad = torch.ones_like(param)
        calls.clear()
        optimizer.step()
        signs = [("sign_squares", 3, None)] * (name == "lowrank")
        assert calls == [
            ("sample_moments", 3, None), ("project_moments", 3, norms), *signs,
            ("lift_write", 3, None),
        ]  # fmt: skip
