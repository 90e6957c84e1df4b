"""The write of an update into the weights: reference of the kernel `lift_write`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .draws import WEIGHT
from .factors import Factor, Unit, drop_, is_index, lift_
from .products import compute_dtype, row_chunks
from .rounding import Noise, round_into_, stack_bits


class Coefficients(Protocol):
    """The factors of an update, see `lowrank_optim.Update`."""

    @property
    def direction(self) -> float:
        """Factor of the direction."""

    @property
    def low(self) -> Tensor | float:
        """Factor of the projected gradient."""

    @property
    def grad(self) -> Tensor | float:
        """Factor of the gradient."""

    @property
    def sign(self) -> float:
        """Factor of the sign of what the projection drops."""


EXACT = (torch.float32, torch.float64)
"""Dtypes in which the sum is made in place."""

Several = Tensor | Sequence[Tensor]
"""Tensors of K matrices, as a stack or one by one."""


def lift_write(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Factor],
    low: Several | None,
    direction: Several | None,
    update: Coefficients,
    step_size: float | Tensor,
    decay: float | Tensor,
    noises: Sequence[Noise] | None = None,
    lengths: Several | None = None,
) -> None:
    """Apply updates to weights in place, without a full-size temporary.

    W <- decay * W + step_size * s ((a N + b R) P^T + phi G + c sgn(G - R P^T))

    The sum is made in float32 (float64 for float64) and rounded once; what has to be widened or
    copied for that is at most `CHUNK` elements at a time.

    Args:
        params: K tensors `(..., rows, cols)`, views of the weights; modified in place.
        grads: K tensors likewise.
        factors: K bases, choices of columns or `UNIT`, see `factors`.
        low: R, `(K, ..., rows, rank)`, or K tensors; None where b and c are 0.
        direction: N, likewise; None where a is 0.
        update: a, b, phi, c as `.direction`, `.low`, `.grad`, `.sign`; b and phi are numbers or
            `(K, ..., rows, 1)`.
        step_size: `-lr`, or `+lr` to maximise; a number or a 0-d tensor.
        decay: `1 - lr * weight_decay`; likewise.
        noises: round bfloat16 weights stochastically with these; None rounds to nearest.
        lengths: s of each matrix, `(K, ...)`; None for 1.
    """
    for k, (param, grad, factor) in enumerate(zip(params, grads, factors, strict=True)):
        step = step_size if lengths is None else stretched(step_size, lengths[k])
        bare = lengths is not None and low is None and isinstance(factor, Unit)
        stretch = 1.0
        if bare and direction is not None and not isinstance(step, Tensor):
            inner: Tensor | None = direction[k]
            stretch = step * update.direction  # no copy of a whole matrix
        else:
            inner = inner_of(low, direction, update, step, k)
        scale_grad = times(update.grad, step, k)
        if param.dtype in EXACT and not update.sign:
            add_into_(param, grad, inner, factor, scale_grad, decay, stretch)
            continue
        dtype = compute_dtype(param.dtype)
        rows, row_size = param.shape[-2], param.numel() // max(1, param.shape[-2])
        for chunk in row_chunks(rows, row_size):
            target = param[..., chunk, :]
            out = target.to(dtype)
            part = None if inner is None else inner[..., chunk, :]
            scale = scale_grad
            if isinstance(scale, Tensor) and scale.ndim and scale.shape[-2] == rows:
                scale = scale[..., chunk, :]
            add_into_(out, grad[..., chunk, :], part, factor, scale, decay, stretch)
            if update.sign and low is not None:
                rest = low[k][..., chunk, :], factor
                add_sign_(out, grad[..., chunk, :], *rest, update.sign * step)
            bits = None
            if noises is not None and param.dtype == torch.bfloat16:
                bits = chunk_bits(noises[k], target, rows, chunk)
            round_into_(target, out, bits)


def add_sign_(
    out: Tensor, grad: Tensor, low: Tensor, factor: Factor, scale: float | Tensor
) -> None:
    """Add `scale sgn(G - R P^T)` in place; for a choice of columns, sgn(G) in the others."""
    if isinstance(factor, Tensor) and is_index(factor):
        columns = torch.ones(grad.shape[-1], dtype=out.dtype, device=out.device)
        columns.index_fill_(0, factor, 0)
        each = isinstance(scale, Tensor) and scale.ndim > 0
        columns = columns * scale if each else columns.mul_(scale)
        out.addcmul_(grad.to(out.dtype).sign(), columns)
        return
    dropped = drop_(grad.to(out.dtype, copy=True), low, factor).sign_()
    if isinstance(scale, Tensor):
        out.add_(dropped.mul_(scale))
    else:
        out.add_(dropped, alpha=scale)


def stretched(step_size: float | Tensor, length: Tensor) -> float | Tensor:
    """Return a step size times the length of a matrix, or of each of a stack, `(..., 1, 1)`.

    It is a number where reading one takes no wait.
    """
    if length.ndim:
        return (length * step_size)[..., None, None]
    return step_size * length.item() if length.device.type == "cpu" else length * step_size


def inner_of(
    low: Several | None,
    direction: Several | None,
    update: Coefficients,
    step_size: float | Tensor,
    k: int,
) -> Tensor | None:
    """Return what is lifted for the k-th matrix, (a N + b R) times the step size; None: nothing."""
    inner = None
    if direction is not None and update.direction:
        inner = direction[k] * (step_size * update.direction)
    scale_low = times(update.low, step_size, k)
    if low is not None and scale_low is not None:
        part = low[k] * scale_low
        inner = part if inner is None else inner.add_(part)
    return inner


def add_into_(
    out: Tensor,
    grad: Tensor,
    inner: Tensor | None,
    factor: Factor,
    scale_grad: Tensor | float | None,
    decay: float | Tensor,
    stretch: float = 1.0,
) -> None:
    """Set `out` to `decay out + stretch inner P^T + scale_grad G`, in place."""
    if inner is not None:
        lift_(out, inner, factor, keep=decay, scale=stretch)
    elif isinstance(decay, Tensor) or decay != 1:
        out.mul_(decay)
    if scale_grad is None:
        return
    if not isinstance(scale_grad, Tensor):
        out.add_(grad.to(out.dtype), alpha=scale_grad)
    elif scale_grad.ndim:
        out.addcmul_(grad.to(out.dtype), scale_grad)
    else:
        out.addcmul_(grad.to(out.dtype), scale_grad.to(out.device))


def times(factor: Tensor | float, step_size: float | Tensor, k: int) -> Tensor | float | None:
    """Return the factor of the k-th matrix times the step size; None for nothing to add."""
    if isinstance(factor, Tensor):
        return factor[k] * step_size
    return factor * step_size if factor else None


def chunk_bits(noise: Noise, target: Tensor, rows: int, chunk: slice) -> Tensor:
    """Return random bits for some rows of a weight, or the same rows of each matrix of a stack."""
    count, cols = target.shape[:-2].numel(), target.shape[-1]
    bits = stack_bits(noise, WEIGHT, count, chunk, rows, cols, target.device)
    return bits.view(target.shape)
