"""How long an update is, from its factors, against the matrix; and where a sample lies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim.functional import (
    UNIT,
    Norms,
    adam,
    lift_write,
    sample_columns,
    sample_moments,
    update_squares,
)
from lowrank_optim.functional.length import stride_of
from lowrank_optim.parts.types import Update


@st.composite
def updates(draw):
    """Return gradients, factors, low, directions and coefficients of some matrices or stacks."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    count, rows, cols = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(3, 8))
    batch = draw(st.sampled_from([(), (2,)]))
    rank = draw(st.integers(2, cols - 1))
    kind = draw(st.sampled_from(["basis", "index", "unit"]))
    grads = [normal(*batch, rows, cols) for _ in range(count)]
    if kind == "basis":
        factors = [torch.linalg.qr(normal(*batch, cols, rank))[0] for _ in grads]
        lows = [grad @ factor for grad, factor in zip(grads, factors, strict=True)]
    elif kind == "index":
        factors = [torch.randperm(cols, generator=rng)[:rank].sort().values for _ in grads]
        lows = [grad[..., factor] for grad, factor in zip(grads, factors, strict=True)]
    else:
        factors, lows = [UNIT] * count, [grad.clone() for grad in grads]
    directions = [torch.randn(low.shape, generator=rng, dtype=low.dtype) for low in lows]

    def coefficient():
        which = draw(st.sampled_from(["none", "number", "rows"]))
        if which == "rows":
            return normal(count, *batch, rows, 1)
        return float(normal(1)) if which == "number" else 0.0

    update = Update(
        draw(st.sampled_from([0.0, 1.0, 0.25])), coefficient(), coefficient(),
        draw(st.sampled_from([0.0, 0.5])),
    )  # fmt: skip
    return grads, factors, lows, directions, update


def formed(grads, factors, lows, directions, update, t):
    """Return the matrices, by the write itself into zeros."""
    update = Update(update.direction, update.low * t, update.grad * t, update.sign)
    params = [torch.zeros_like(grad) for grad in grads]
    lift_write(params, grads, factors, lows, directions, update, 1.0, 1.0)
    return params


@settings(deadline=None)
@given(updates(), st.sampled_from([1.0, 0.3]), st.booleans())
def test_squares_are_those_of_the_matrix(made, t, with_norms):
    """Also with row norms that are known, as kernels give them."""
    grads, factors, lows, directions, update = made
    norms = None
    if with_norms:
        rows = (grads, lows, directions)
        norms = Norms(*(torch.stack([x.norm(dim=-1, keepdim=True) for x in xs]) for xs in rows))
    found = update_squares(grads, factors, lows, directions, update, norms)
    total = found[..., 0]
    if found.shape[-1] == 3:
        total = total + 2 * t * found[..., 1] + t * t * found[..., 2]
    matrices = torch.stack(formed(*made, t))
    torch.testing.assert_close(total, matrices.square().sum((-2, -1)), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(updates())
def test_a_write_is_as_long_as_it_is_told(made):
    """One factor for each matrix, also of a stack, in the products, the gradient and the sign."""
    grads, factors, lows, directions, update = made
    plain = formed(*made, 1.0)
    lengths = torch.arange(1, 1 + plain[0].shape[:-2].numel() * len(grads), dtype=torch.float64)
    lengths = lengths.view(len(grads), *grads[0].shape[:-2])
    params = [torch.ones_like(grad) for grad in grads]
    lift_write(params, grads, factors, lows, directions, update, -0.5, 0.9, None, lengths)
    for param, move, length in zip(params, plain, lengths, strict=True):
        torch.testing.assert_close(param, 0.9 - 0.5 * length[..., None, None] * move)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**40))
def test_a_sample_is_spread_over_rows_and_columns(rows, cols, width, first):
    """Distinct in a row, all columns equally often, the same however rows are shared out."""
    width = min(width, cols)
    columns = sample_columns(rows, cols, width, first)
    assert columns.shape == (rows, width)
    assert int(columns.min()) >= 0
    assert int(columns.max()) < cols
    assert all(len(set(row.tolist())) == width for row in columns)
    counts = columns.flatten().bincount(minlength=cols)
    assert int(counts.max() - counts.min()) <= 1
    cut = rows // 2
    rest = sample_columns(rows - cut, cols, width, first + cut * width)
    assert torch.equal(rest, columns[cut:])


@settings(deadline=None)
@given(st.integers(1, 20000))
def test_the_stride_reaches_every_column(cols):
    assert math.gcd(stride_of(cols), cols) == 1


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize("counts", [[2, 2], [2, 7], [torch.tensor(2.0), torch.tensor(2.0)]])
def test_moments_of_a_sample_are_adams(shape, counts):
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)]
    *batch, rows, cols = shape
    held = [torch.rand((4, *batch, rows, 2), generator=rng, dtype=torch.float64) for _ in range(2)]
    firsts, seconds = held[0][:2].clone(), held[0][2:].clone()
    numbers = [3, 11]
    found = sample_moments(grads, firsts, seconds, numbers, counts, 0.9, 0.99, 1e-8)
    for k, grad in enumerate(grads):
        columns = sample_columns(rows, cols, 2, numbers[k])
        entries = torch.stack([grad[..., i, columns[i]] for i in range(rows)], -2)
        m, v = held[0][k].clone(), held[0][2 + k].clone()
        direction = adam(entries, m, v, counts[k], 0.9, 0.99, 1e-8)
        torch.testing.assert_close(found[k], direction.square().sum((-2, -1)))
        torch.testing.assert_close(firsts[k], m)
        torch.testing.assert_close(seconds[k], v)
