"""The moments' part of a step, for lists of matrices of one shape: references of the kernels.

`exp_avg` and `exp_avg_sq` are lists of stored moments: tensors, or pairs `(codes, scale)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .blockwise import BLOCK
from .draws import EXP_AVG, EXP_AVG_SQ, WEIGHT
from .factors import Factor, down
from .moments import adam, select_moment
from .products import compute_dtype, row_chunks, row_norms
from .rounding import Draw, Noise, on_device, random_bits, round_into_, stack_bits
from .stored import Stored, load, store


class Norms(NamedTuple):
    """Row norms `(..., rows, 1)` of the gradient, its projection and the direction."""

    grad: Tensor
    low: Tensor
    direction: Tensor


class Projected(NamedTuple):
    """What the moments' part of a step hands to the residual and to the write.

    Attributes:
        low: the projected gradients, `(K, ..., rows, rank)`.
        direction: Adam's directions, likewise.
        norms: row norms.
    """

    low: Tensor | None
    direction: Tensor | None
    norms: Norms | None


class Want(NamedTuple):
    """Which parts of `Projected` are needed."""

    low: bool = True
    direction: bool = True
    norms: bool = True


def bits_of(
    noise: Noise, kind: int, like: Tensor, plain: bool = False, draw: Draw = random_bits
) -> Tensor:
    """Return random bits for a moment or a weight, int32 of its shape.

    Rows are numbered over all axes except the last. For a `plain` parameter, which is not
    projected, they are numbered over the first axis alone. A vector is one row. `draw` is
    `random_bits`, or a kernel that does the same.
    """
    count, rows = 1, 1
    if like.ndim > 1:
        rows = like.shape[0] if plain else like.shape[-2]
        count = 1 if plain else like.shape[:-2].numel()
    cols = like.numel() // max(1, count * rows)
    with on_device(like.device):
        bits = stack_bits(noise, kind, count, slice(0, rows), rows, cols, like.device, draw)
    return bits.view(like.shape)


def move_columns(
    moments: Sequence[tuple[Tensor, Tensor]],
    places: Tensor,
    square: bool,
    noises: Sequence[Noise],
    kind: int,
) -> None:
    """Give moments in 8 bits other columns, in place: see `select_moment`.

    Args:
        moments: K codes of one shape `(..., rows, rank)`, with their scales.
        places: `(K, ..., rank)`, where each column is now, -1 for one that begins with zeros; may
            lack the axes between.
        square: whether they are averages of squares.
        noises: K sources of the random bits that squares are rounded by.
        kind: of these bits.
    """
    *batch, count, rank = moments[0][0].shape
    filled = -(-rank // BLOCK) * BLOCK
    for (codes, scale), place, noise in zip(moments, places, noises, strict=True):
        for rows in row_chunks(count, filled * torch.Size(batch).numel()):
            some = codes[..., rows, :], scale[..., rows, :]
            moment = load(some, torch.float32, square)
            select_moment(moment, place)
            here = noise._replace(stream=noise.stream + rows.start)
            store(some, moment, square, partial(bits_of, here, kind, moment))
            if codes.is_meta and rows.start:
                break  # no values: the other pieces show nothing new


def adam_moments(
    grads: Sequence[Tensor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    noises: Sequence[Noise],
    plain: bool = True,
) -> Tensor:
    """Load Adam's moments, update them, store them, and return the directions: see `adam`.

    Args:
        grads: K tensors of one shape, in float32 (float64) or to be widened to it.
        exp_avg, exp_avg_sq: K stored moments of that shape; modified in place.
        counts: K numbers of gradients seen, this one included.
        beta1, beta2, eps: as in `torch.optim.AdamW`.
        noises: K sources of random bits, for moments that are rounded stochastically.
        plain: whether these are parameters that are not projected, see `bits_of`.

    Returns:
        `(K, ...)` directions in the dtype of the arithmetic.
    """
    directions = []
    for grad, first, second, count, noise in zip(
        grads, exp_avg, exp_avg_sq, counts, noises, strict=True
    ):
        dtype = compute_dtype(grad.dtype)
        mean, square = load(first, dtype, False), load(second, dtype, True)
        directions.append(adam(grad.to(dtype), mean, square, count, beta1, beta2, eps))
        store(first, mean, False, partial(bits_of, noise, EXP_AVG, mean, plain))
        store(second, square, True, partial(bits_of, noise, EXP_AVG_SQ, square, plain))
    return torch.stack(directions)


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float | Tensor,
    decay: float | Tensor,
    noises: Sequence[Noise],
    rounded: bool,
) -> None:
    """Do whole AdamW steps of parameters that are not projected, in place.

    W <- decay * W + step_size * N, with N and the moments as in `adam_moments`.

    Args:
        params: K tensors of one shape; modified in place.
        grads, exp_avg, exp_avg_sq, counts, beta1, beta2, eps, noises: as in `adam_moments`.
        step_size: `-lr`, or `+lr` to maximise; a number or a 0-d tensor.
        decay: `1 - lr * weight_decay`; likewise.
        rounded: round bfloat16 weights stochastically.
    """
    directions = adam_moments(grads, exp_avg, exp_avg_sq, counts, beta1, beta2, eps, noises)
    for param, direction, noise in zip(params, directions, noises, strict=True):
        out = param.to(direction.dtype).mul(decay).add_(direction.mul_(step_size))
        rounds = rounded and param.dtype == torch.bfloat16
        round_into_(param, out, bits_of(noise, WEIGHT, param, True) if rounds else None)


def project_moments(
    grads: Sequence[Tensor],
    factors: Sequence[Factor],
    exp_avg: Sequence[Stored],
    exp_avg_sq: Sequence[Stored],
    counts: Sequence[int | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    noises: Sequence[Noise],
    want: Want = Want(),  # noqa: B008
) -> Projected:
    """Project gradients and do what `adam_moments` does with them.

    R = G P, or the chosen columns of G; M, V, N from R; row norms of G, R and N on the way.

    Args:
        grads: K tensors `(..., rows, cols)` of any strides.
        factors: K bases `(..., cols, rank)`, or K integer tensors `(rank,)` of columns.
        exp_avg, exp_avg_sq: K stored moments `(..., rows, rank)`; modified in place.
        counts, beta1, beta2, eps, noises: as in `adam_moments`.
        want: which results are needed; the others are None.
    """
    dtype = compute_dtype(grads[0].dtype)
    low = torch.stack([down(grad, f, dtype) for grad, f in zip(grads, factors, strict=True)])
    direction = adam_moments(
        low.unbind(), exp_avg, exp_avg_sq, counts, beta1, beta2, eps, noises, False
    )
    norms = None
    if want.norms:
        whole = torch.stack([row_norms(grad, dtype) for grad in grads])
        norms = Norms(whole, row_norms(low, dtype), row_norms(direction, dtype))
    return Projected(low if want.low else None, direction if want.direction else None, norms)
