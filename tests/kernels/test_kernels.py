"""Every kernel against its plain reference of the same name.

They add in another order, and kernels keep float32 sums where plain torch rounds a bfloat16 product
at once: so float32 is compared to 1e-5 and bfloat16 to a few of its units; codes, scales and random
bits are compared byte by byte.
"""

from __future__ import annotations

import pytest
import torch

from helpers.kernels import bases, columns, draw, matrices
from helpers.pairwise import crossed
from lowrank_optim import Update, functional

pytest.importorskip("triton", reason="kernels need triton")
from lowrank_optim import kernels

BETAS = (0.9, 0.99)
EPS = 1e-8
FORMS = ("float32", "bfloat16", "8bit")
LAYOUTS = ("straight", "transposed", "strided")
SIZES = {
    "tall": (70, 37, 5),
    "wide": (45, 33, 19),
    "narrow rank": (16, 130, 2),
    "two blocks": (6, 310, 300),
}
"""Rows, columns and rank; of the last, a row of 8-bit moments has a block and a part of one."""
LOOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.usefixtures("poisoned")
each_device = pytest.mark.usefixtures("device")


def moments(count, shape, form, device, seed=80):
    """Stored first and second moments that have seen some gradients."""
    first = [draw(shape, torch.float32, device, seed + k, 0.1) for k in range(count)]
    second = [draw(shape, torch.float32, device, seed + 9 + k, 0.1).square() for k in range(count)]
    if form == "8bit":
        return (
            [functional.quantize_blockwise(x) for x in first],
            [functional.quantize_squares(x) for x in second],
        )
    dtype = getattr(torch, form)
    return [x.to(dtype) for x in first], [x.to(dtype) for x in second]


def twins(*lists):
    """Copies of lists of tensors or pairs that keep their strides."""

    def copy(x):
        if isinstance(x, tuple):
            return tuple(copy(part) for part in x)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    return [[copy(x) for x in items] for items in lists]


def noises(count, step=7, seed=(1 << 40) + 5):
    return [functional.Noise(seed, step, functional.stream_of(3 + k, 10 * k)) for k in range(count)]


def assert_stored(left, right, square, tolerance=1e-5):
    """Stored moments agree: to rounding, and in 8 bits to one code in few places."""
    for one, other in zip(left, right, strict=True):
        if isinstance(one, tuple):
            torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=0)
            apart = (one[0].int() - other[0].int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() <= 100 * tolerance
        elif one.dtype == torch.bfloat16:
            torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)
            assert (one != other).float().mean() <= 1000 * tolerance
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(300,), (5, 7), (5, 256), (6, 300), (4, 3, 5)])
def test_adam_moments(shape, form, device):
    grads = [draw(shape, torch.float32, device, k) for k in range(2)]
    stored = moments(2, shape if len(shape) < 3 else (4, 15), form, device)
    if len(shape) == 3:
        stored = [
            [
                (x[0].view(shape), x[1]) if isinstance(x, tuple) else x.view(shape)
                for x in items
            ]
            for items in stored
        ]  # fmt: skip
    other = twins(*stored)
    arguments = ([4] * 2, *BETAS, EPS, noises(2))
    left = kernels.adam_moments(grads, *stored, *arguments)
    right = functional.adam_moments(grads, *other, *arguments)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert_stored(stored[0], other[0], False)
    assert_stored(stored[1], other[1], True)


def test_moments_that_fade_have_the_scale_of_what_is_there(device):
    """A code beyond the row stands for nearly the old scale."""
    stored = moments(2, (3, 300), "8bit", device)
    other = twins(*stored)
    grads = [-8.9 * functional.dequantize_blockwise(*pair) for pair in stored[0]]
    arguments = ([4] * 2, *BETAS, EPS, noises(2))
    left = kernels.adam_moments(grads, *stored, *arguments)
    right = functional.adam_moments(grads, *other, *arguments)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert_stored(stored[0], other[0], False)
    assert_stored(stored[1], other[1], True)


@crossed(form=FORMS, dtype=[torch.float32, torch.bfloat16], rounded=[False, True])
def test_adam_step(dtype, form, rounded, device):
    shape = (7, 300)
    params = [draw(shape, dtype, device, 20 + k) for k in range(2)]
    grads = [draw(shape, dtype, device, k) for k in range(2)]
    stored = moments(2, shape, form, device)
    (other_params,), other = twins(params), twins(*stored)
    arguments = ([4] * 2, *BETAS, EPS, -1e-2, 0.999, noises(2), rounded)
    kernels.adam_step(params, grads, *stored, *arguments)
    functional.adam_step(other_params, grads, *other, *arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for left, right in zip(params, other_params, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=1e-6)
        assert (left != right).float().mean() <= (1 if dtype == torch.float32 else 0.01)
    assert_stored(stored[0], other[0], False)
    assert_stored(stored[1], other[1], True)


@crossed(
    size=SIZES,
    form=FORMS,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    layout=LAYOUTS,
    kind=["basis", "columns"],
)
def test_project_moments(size, dtype, kind, layout, form, device):
    rows, cols, rank = SIZES[size]
    if form == "8bit":
        rows = rows // 2 + 1  # a program a row, which takes the interpreter its time
    grads = matrices(2, rows, cols, dtype, device, layout)
    factors = (
        bases(2, cols, rank, torch.float32, device)
        if kind == "basis"
        else columns(2, cols, rank, device)
    )
    stored = moments(2, (rows, rank), form, device)
    other, third = twins(*stored), twins(*stored)
    arguments = ([4] * 2, *BETAS, EPS, noises(2))
    left = kernels.project_moments(grads, factors, *stored, *arguments)
    if kind == "basis":
        rounded = [factor.to(dtype).float() for factor in factors]
        wide = [grad.float() for grad in grads]
    else:
        rounded, wide = factors, [grad.float() for grad in grads]
    right = functional.project_moments(wide, rounded, *other, *arguments)
    tolerance = LOOSE[dtype]
    torch.testing.assert_close(left.low.float(), right.low, rtol=tolerance, atol=tolerance)
    direction = right.direction
    if dtype == torch.float32:  # of the same projection: a small root enlarges what products round
        direction = functional.adam_moments(left.low.unbind(), *third, *arguments, False)
    torch.testing.assert_close(left.direction.float(), direction, rtol=tolerance, atol=tolerance)
    for one, two in zip(left.norms, right.norms, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert_stored(stored[0], other[0], False, 1e-4)
    assert_stored(stored[1], other[1], True, 1e-4)


def test_project_moments_gives_what_is_wanted_and_no_more(device):
    grads, factors = (
        matrices(1, 9, 7, torch.float32, device, ""),
        bases(1, 7, 3, torch.float32, device),
    )
    for want in ((True, False, False), (False, True, False), (False, False, True)):
        stored = moments(1, (9, 3), "float32", device)
        found = kernels.project_moments(grads, factors, *stored, [1], *BETAS, EPS, noises(1), want)
        assert tuple(part is not None for part in found) == want


UPDATES = {
    "drop": Update(direction=0.25),
    "norm_scaled": Update(direction=0.25, low=None, grad=None),
    "sgd": Update(direction=1.0, low=-0.5, grad=0.5),
    "sign": Update(direction=1.0, sign=0.5),
    "grad_scaled": Update(grad=None),
}
"""None stands for one factor a row."""


WEIGHTS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "rounded": (torch.bfloat16, True),
}
"""Dtypes, and whether weights are rounded stochastically, which only bfloat16 ones are."""


@crossed(
    name=UPDATES,
    weight=WEIGHTS,
    layout=LAYOUTS,
    kind=["basis", "columns"],
    size=["tall", "narrow rank"],
)
def test_lift_write(size, kind, layout, weight, name, device):
    dtype, rounded = WEIGHTS[weight]
    rows, cols, rank = SIZES[size]
    params = matrices(2, rows, cols, dtype, device, layout, 30)
    grads = matrices(2, rows, cols, dtype, device, layout)
    if kind == "basis":
        factors = bases(2, cols, rank, dtype, device)
    else:
        factors = columns(2, cols, rank, device)
    wide = [grad.float() for grad in grads]
    wide_factors = [f.float() if kind == "basis" else f for f in factors]
    low = torch.stack(
        [functional.down(g, f, torch.float32) for g, f in zip(wide, wide_factors, strict=True)]
    )
    low = low.to(dtype)
    direction = draw(low.shape, dtype, device, 5)
    rowwise = draw((2, rows, 1), torch.float32, device, 6).abs()
    update = Update(**{
        key: rowwise if value is None else value for key, value in vars(UPDATES[name]).items()
    })  # fmt: skip
    if name == "norm_scaled":
        update = Update(update.direction, update.low * -0.25, update.grad)
    (other,) = twins(params)
    noise = noises(2) if rounded else None
    given = direction.clone()
    kernels.lift_write(params, grads, factors, low, given, update, -0.1, 0.99, noise)
    functional.lift_write(
        other, grads, wide_factors, low.float(), direction.float(), update, -0.1, 0.99, noise
    )
    near = None
    if name == "sign" and kind == "basis":  # of chosen columns nothing is left, exactly
        kept = torch.stack([g @ f @ f.mT for g, f in zip(wide, wide_factors, strict=True)])
        near = (torch.stack(wide) - kept).abs() < 0.02 * (1 if dtype == torch.bfloat16 else 1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for k, (left, right) in enumerate(zip(params, other, strict=True)):
        clear = torch.ones_like(left, dtype=torch.bool) if near is None else ~near[k]
        assert clear.float().mean() > 0.8
        torch.testing.assert_close(left[clear], right[clear], rtol=tolerance, atol=tolerance / 10)


def test_run_time_numbers_may_lie_on_the_device(device):
    """Counts, step size and decay as tensors: what a captured step uses."""
    rows, cols, rank = SIZES["tall"]
    grads = matrices(2, rows, cols, torch.bfloat16, device, "straight")
    params = matrices(2, rows, cols, torch.bfloat16, device, "straight", 30)
    factors = bases(2, cols, rank, torch.bfloat16, device)
    results = []
    for on_device in (False, True):
        stored = moments(2, (rows, rank), "bfloat16", device)
        (weights,) = twins(params)
        counts, noise = [4, 4], noises(2)
        rate, decay = -0.1, 0.99
        if on_device:
            counts = [torch.tensor(4.0, device=device) for _ in range(2)]
            noise = [n._replace(step=torch.tensor(7.0, device=device)) for n in noise]
            rate = torch.tensor(rate, device=device)
            decay = 1 + rate * 0.1
        found = kernels.project_moments(grads, factors, *stored, counts, *BETAS, EPS, noise)
        update = Update(direction=0.5, sign=0.1)
        kernels.lift_write(
            weights, grads, factors, found.low, found.direction, update, rate, decay, noise
        )
        results.append((weights, stored, found))
    for k in range(2):
        assert torch.equal(results[0][0][k], results[1][0][k])
        assert torch.equal(results[0][1][1][k], results[1][1][1][k])
    torch.testing.assert_close(results[0][2].direction, results[1][2].direction)


def test_counts_of_one_launch_are_alike(device):
    grads, factors = (
        matrices(2, 9, 7, torch.float32, device, ""),
        bases(2, 7, 3, torch.float32, device),
    )
    stored = moments(2, (9, 3), "float32", device)
    with pytest.raises(ValueError, match="same count"):
        kernels.project_moments(grads, factors, *stored, [1, 2], *BETAS, EPS, noises(2))


def test_default_dtype_does_not_matter(device):
    """Norms, tables and random bits are what they are under any default."""
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            grads = matrices(1, 9, 7, torch.float32, device, "")
            factors = bases(1, 7, 3, torch.float32, device)
            stored = moments(1, (9, 3), "8bit", device)
            arguments = (grads, factors, *stored, [1], *BETAS, EPS, noises(1))
            results.append((kernels.project_moments(*arguments), stored))
        finally:
            torch.set_default_dtype(torch.float32)
    for found, stored in results[1:]:
        assert torch.equal(found.norms.grad, results[0][0].norms.grad)
        for left, right in zip(stored, results[0][1], strict=True):
            assert torch.equal(left[0][0], right[0][0])
