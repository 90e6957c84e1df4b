"""Finite gradients of any size give finite weights, and no step is far beyond AdamW's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.cases import CASES, GAP
from helpers.pairwise import in_turn
from lowrank_optim import RACS, CompensatedAdamW, CondaW
from lowrank_optim.functional import (
    adam,
    dequantize_squares,
    down,
    least_share,
    quantize_squares,
    raise_square_,
    rotate_moments,
)
from lowrank_optim.parts.limiter import FIRST, limit

each_case = pytest.mark.parametrize("case", CASES, ids=str)
BOUNDED = [case for case in CASES if not case.name.startswith("sgdm")]
"""Gradient descent is as long as the gradient, in torch too."""
SHAPES = [(9, 5), (2, 4, 7)]
SIZES = {
    torch.float32: [1e-45, 1e-23, 1e-21, 1e-19, 1e20, 1e38],
    torch.float64: [5e-324, 1e-162, 1e160, 1e307],
    torch.bfloat16: [1e-40, 1e-21, 1e20, 1e38],
    torch.float16: [6e-8, 6e4],
}


def scaled(grad: Tensor, size: float, kind: str, step: int) -> Tensor:
    """Return a gradient of which a part is so many times as large, within its dtype's range."""
    large, most = grad.double() * size, torch.finfo(grad.dtype).max
    part = torch.zeros(grad.shape, dtype=torch.bool)
    if kind == "row":
        part[..., 1, :] = True
    elif kind == "column":
        part[..., 1] = True
    elif kind == "first":
        part[:] = step == 0
    else:
        part[:] = kind == "all" or step % 2 == 1
    return torch.where(part, large, grad.double()).clamp(-most, most).to(grad.dtype)


@pytest.mark.parametrize(
    ("case", "dtype"), [*in_turn(CASES, *SIZES), *in_turn(CASES[1:], *SIZES)], ids=str
)
def test_finite_gradients_of_any_size_give_finite_weights(case, dtype):
    """Large or small at once, in one row or column, at the first step, at every other step."""
    kinds = ["all", "row", "column", "first", "turns"]
    places = [(kind, shape) for kind in kinds for shape in SHAPES]
    for size in SIZES[dtype]:
        params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _, shape in places]
        optimizer = case.build(params)
        for step in range(GAP + 2):
            rng = torch.Generator().manual_seed(step)
            for param, (kind, shape) in zip(params, places, strict=True):
                grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
                param.grad = scaled(grad, size, kind, step)
            optimizer.step()
        for param, place in zip(params, places, strict=True):
            assert param.isfinite().all(), (size, *place)


def first_step(case, grad: Tensor) -> Tensor:
    param = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = case.build([param], weight_decay=0.0)
    param.grad = grad
    optimizer.step()
    return param.detach() / optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("case", BOUNDED, ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_one_outlier_in_the_first_gradient_does_not_throw_the_weights(case, shape):
    for seed in range(3):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        usual = first_step(case, grad).square().mean().sqrt()
        grad[2, 1] = 1e6
        assert first_step(case, grad).square().mean().sqrt() < 2 * usual + 1


def test_no_value_of_the_first_step_of_racs_is_far_beyond_the_others():
    grad = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    grad[2, 1] = 1e6
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    RACS([param], weight_decay=0.0).step()
    assert param.abs().max() < 10 * 2e-2 * 0.05


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-40, 1e-45])
def test_a_row_of_the_smallest_gradients_moves_no_farther_than_others(size):
    param = torch.nn.Parameter(torch.zeros(13, 7))
    optimizer = CompensatedAdamW([param], lr=1e-2, rank=3, weight_decay=0.0)
    for step in range(5):
        param.grad = torch.randn(13, 7, generator=torch.Generator().manual_seed(step))
        param.grad[4] *= size
        before = param.detach().clone()
        optimizer.step()
        moved = (param.detach() - before).norm(dim=1)
        assert moved[4] <= moved.max()


def longest(optimizer: torch.optim.Optimizer, param: Tensor, active) -> float:
    """Return the largest root mean square of a row's step over lr, rows being active at times."""
    most = 0.0
    for step in range(120):
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        param.grad = grad * active(step, param.shape[0]).unsqueeze(-1)
        before = param.detach().clone()
        optimizer.step()
        rows = (param.detach() - before).square().mean(1).sqrt()
        most = max(most, float(rows.max()) / optimizer.param_groups[0]["lr"])
    return most


@pytest.mark.parametrize("rank", [1.0, 6])
@pytest.mark.parametrize("every", [7, 40])
def test_rows_that_are_rarely_active_do_not_jump_after_a_refresh(rank, every):
    """Conda's second moment stays in the old basis, where such a row has next to nothing."""

    def active(step: int, rows: int) -> Tensor:
        return torch.arange(rows) % every == step % every

    ours, theirs = (torch.nn.Parameter(torch.zeros(40, 24)) for _ in range(2))
    parts = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0}
    conda = CondaW([ours], rank=rank, update_proj_gap=50, scale=1.0, **parts)
    adamw = torch.optim.AdamW([theirs], **parts)
    assert longest(conda, ours, active) < 2.5 * longest(adamw, theirs, active)


BETAS = st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999))


@settings(deadline=None, max_examples=60)
@given(BETAS, st.integers(0, 2**31), st.floats(-0.5, 0.5))
def test_the_least_second_moment_changes_nothing_in_one_basis(betas, seed, growth):
    """For any gradients, also such as grow or shrink each step: Cauchy and Schwarz."""
    beta1, beta2 = betas
    mean, square = (torch.zeros(6, dtype=torch.float64) for _ in range(2))
    plain_mean, plain_square = mean.clone(), square.clone()
    rng = torch.Generator().manual_seed(seed)
    for step in range(1, 40):
        grad = torch.randn(6, generator=rng, dtype=torch.float64) * math.exp(growth * step)
        raise_square_(mean, square, beta1, beta2)
        adam(grad, mean, square, step, beta1, beta2, 1e-8)
        plain_mean.lerp_(grad, 1 - beta1)
        plain_square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        assert torch.equal(mean, plain_mean)
        assert torch.equal(square, plain_square)


def test_a_second_moment_without_anything_is_made_up_from_the_first():
    mean, square = torch.ones(1), torch.zeros(1)
    raise_square_(mean, square, 0.9, 0.99)
    bound = 0.1 / math.sqrt(0.01 * (1 - 0.81 / 0.99))
    assert float(mean / square.sqrt()) == pytest.approx(4 * bound, rel=1e-6)
    assert least_share(0.9, 0.8) == 0


def test_moments_that_overflow_are_rotated_without_nan():
    mean, square = torch.full((2, 3), 1e38), torch.full((2, 3), math.inf)
    rotate_moments(mean, square, torch.eye(3), 5, 0.9, 0.99)
    assert mean.isfinite().all()
    assert not square.isnan().any()


def test_a_sum_that_overflows_is_cut_off_and_others_stay():
    basis = torch.linalg.qr(torch.randn(600, 3, generator=torch.Generator().manual_seed(0)))[0]
    grad = torch.ones(4, 600)
    grad[1] = torch.where(basis[:, 0] > 0, 3e38, -3e38)
    grad[2, 5] = math.inf
    low = down(grad, basis, torch.float32)
    assert low[1].isfinite().all()
    assert low[1, 0] > 1e35
    assert not low[2].isfinite().any()
    torch.testing.assert_close(low[0], down(grad[:1], basis, torch.float32)[0])


def test_zeros_beside_an_infinite_square_are_no_nan():
    square = torch.tensor([[0.0, 1e-5, math.inf, 3.0]])
    assert dequantize_squares(*quantize_squares(square)).isinf().all()


def test_the_first_norm_has_a_bound_where_one_is_given():
    state = {"residual_norm": torch.tensor([math.inf, math.inf, math.inf])}
    found = limit(torch.tensor([6.0, 2.0, math.inf]), state, 1.01, FIRST).flatten()
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 0.0]))
    torch.testing.assert_close(state["residual_norm"], torch.tensor([3.0, 2.0, math.inf]))
