"""The update of weights: the reference of the second kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .factors import Factor, drop_, lift_
from .products import compute_dtype, row_chunks
from .rounding import WEIGHT, Noise, round_into_, stack_bits


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


def lift_write(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Factor],
    low: Tensor | None,
    direction: Tensor | None,
    update: Coefficients,
    step_size: float | Tensor,
    decay: float | Tensor,
    noises: Sequence[Noise] | None = None,
) -> None:
    """Apply updates to weights in place, without a full-size temporary.

    W <- decay * W + step_size * ((a N + b R) P^T + phi G + c sgn(G - R P^T))

    The sum is made in float32 (float64 for float64) and rounded once; what has to be widened or
    copied for that is at most `CHUNK` elements at a time.

    Args:
        params: K tensors `(..., rows, cols)`, views of the weights; modified in place.
        grads: K tensors likewise.
        factors: K bases, choices of columns or `UNIT`, see `factors`.
        low: R, `(K, ..., rows, rank)`; None where b and c are 0.
        direction: N, likewise; None where a is 0.
        update: a, b, phi, c as `.direction`, `.low`, `.grad`, `.sign`; b and phi are numbers or
            `(K, ..., rows, 1)`.
        step_size: `-lr`, or `+lr` to maximise; a number or a 0-d tensor.
        decay: `1 - lr * weight_decay`; likewise.
        noises: round bfloat16 weights stochastically with these; None rounds to nearest.
    """
    for k, (param, grad, factor) in enumerate(zip(params, grads, factors, strict=True)):
        inner = None
        if direction is not None and update.direction:
            inner = direction[k] * (step_size * update.direction)
        scale_low, scale_grad = times(update.low, step_size, k), times(update.grad, step_size, k)
        if low is not None and scale_low is not None:
            part = low[k] * scale_low
            inner = part if inner is None else inner.add_(part)
        dtype = compute_dtype(param.dtype)
        wide = param.dtype == dtype
        rows, row_size = param.shape[-2], param.numel() // max(1, param.shape[-2])
        chunks = [slice(0, rows)]
        if not wide or update.sign:
            chunks = list(row_chunks(rows, row_size))
        for chunk in chunks:
            target = param if len(chunks) == 1 else param[..., chunk, :]
            out = target if wide else target.to(dtype)
            if inner is None:
                out.mul_(decay)
            else:
                lift_(out, inner if target is param else inner[..., chunk, :], factor, keep=decay)
            if isinstance(scale_grad, Tensor) and scale_grad.ndim:
                out.addcmul_(grad[..., chunk, :].to(dtype), scale_grad[..., chunk, :])
            elif isinstance(scale_grad, Tensor):
                out.addcmul_(grad[..., chunk, :].to(dtype), scale_grad.to(out.device))
            elif scale_grad is not None:
                out.add_(grad[..., chunk, :].to(dtype), alpha=scale_grad)
            if update.sign and low is not None:
                dropped = grad[..., chunk, :].to(dtype, copy=True)
                dropped = drop_(dropped, low[k][..., chunk, :], factor)
                out.add_(dropped.sign_().mul_(update.sign * step_size))
            bits = None
            if noises is not None and param.dtype == torch.bfloat16:
                bits = chunk_bits(noises[k], target, rows, chunk)
            if out is not target:
                round_into_(target, out, bits)


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
