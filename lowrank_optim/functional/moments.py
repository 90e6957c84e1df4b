"""Adam's moments: the update, and how they are carried into a new subspace."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bias_corrections(
    count: int | Tensor, beta1: float, beta2: float
) -> tuple[float | Tensor, float | Tensor]:
    """Return 1 - b1^t and sqrt(1 - b2^t); for a count on the device in float64, and there too."""
    if isinstance(count, Tensor):
        t = count.to(torch.float64)
        return 1 - beta1**t, (1 - beta2**t).sqrt()
    return 1 - beta1**count, math.sqrt(1 - beta2**count)


BEYOND = 4.0
"""A direction is at most so many times as long as one in a basis that has never moved can be."""


def least_share(beta1: float, beta2: float) -> float:
    """Return c, the least share of M*M that V is kept at.

    c = (1-b2) (1 - b1^2/b2) / ((1-b1)^2 BEYOND^2), or 0 where b1^2 >= b2

    M = (1-b1) sum b1^k g_k and V = (1-b2) sum b2^k g_k^2, so that by Cauchy and Schwarz
    M^2 <= (1-b1)^2 / (1-b2) sum (b1^2/b2)^k V: for any gradients V is 16 c M^2 or more.
    """
    room = max(0.0, beta2 - beta1**2)
    return (1 - beta2) * room / (beta2 * ((1 - beta1) * BEYOND) ** 2) if room else 0.0


def raise_square_(exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float) -> None:
    """Raise V to c M*M where it is less, in place, with c of `least_share`.

    That changes nothing where M and V are of the same coordinates, in this step and later ones.
    Where V is of a basis that has moved since (Conda's), a row that is rarely active may have no V
    where its M lies, and would move by M / eps.

    Args:
        exp_avg, exp_avg_sq: of one shape; the second is modified.
        beta1, beta2: decay of the moments.
    """
    least = exp_avg.square().mul_(least_share(beta1, beta2))
    torch.maximum(exp_avg_sq, least, out=exp_avg_sq)


def adam(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: int | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Update Adam's moments in place and return the bias-corrected direction.

    M <- b1 M + (1-b1) g,  V <- b2 V + (1-b2) g*g,
    N = (M / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps)

    Args:
        grad: any shape, in the dtype of the moments.
        exp_avg, exp_avg_sq: same shape; modified in place.
        count: t, the number of gradients seen, this one included; a 0-d tensor stays on its device.
        beta1, beta2, eps: as in `torch.optim.AdamW`.
    """
    correction1, correction2 = bias_corrections(count, beta1, beta2)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(correction2).add_(eps).mul_(correction1)
    return torch.div(exp_avg, denominator, out=denominator)


def adam_some(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    count: int | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Do what `adam` does with several small gradients of one count, to the bit, in fewer calls."""
    correction1, correction2 = bias_corrections(count, beta1, beta2)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, correction2)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(denominators, correction1)
    return list(torch._foreach_div(exp_avgs, denominators))


def rotate_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, rotation: Tensor, count: int, beta1: float, beta2: float
) -> None:
    """Carry Adam's moments into a new basis, in place: exact for M, an estimate for V.

    With Q = P_old^T P_new, t gradients seen, m = M / (1-b1^t) and v = V / (1-b2^t):
    M <- M Q,  V <- (1-b2^t) |(v - m*m) (Q*Q) + (m Q)^2|
    that is, the variance is carried as if the coordinates were uncorrelated. Values are cut off
    where sums of `rank` of them would overflow.

    Args:
        exp_avg, exp_avg_sq: `(..., rows, rank)`; modified in place.
        rotation: `(..., rank, rank)`.
        count: t, at least 1.
        beta1, beta2: as in `torch.optim.AdamW`.

    Reference: Robert, Safaryan, Modoranu, Alistarh, "LDAdam: Adaptive Optimization from
        Low-Dimensional Gradient Statistics", arXiv 2410.16103.
    """
    correction1, correction2 = 1 - beta1**count, 1 - beta2**count
    most = torch.finfo(exp_avg.dtype).max / rotation.shape[-2]
    mean = (exp_avg / correction1).clamp_(-most, most)
    variance = (exp_avg_sq / correction2).clamp_(max=most)
    variance.addcmul_(mean, mean, value=-1).clamp_(min=-most)
    mean = mean @ rotation
    exp_avg.copy_(mean * correction1)
    second = (variance @ rotation.square()).addcmul_(mean, mean)
    exp_avg_sq.copy_(second.abs_().mul_(correction2))


def places_of(old: Tensor, new: Tensor) -> Tensor:
    """Return where each column of a subset was in another, int64 of the shape of `new`; or -1.

    Args:
        old, new: `(..., rank)` integers, sorted and distinct.
    """
    place = torch.searchsorted(old, new).clamp_(max=old.shape[-1] - 1)
    return torch.where(old.gather(-1, place) == new, place, -1)


def select_moment(moment: Tensor, places: Tensor) -> None:
    """Carry a moment between two subsets of one basis, in place.

    The columns that stay are copied, new ones become zero: the product with the 0/1 matrix
    `P_old^T P_new`, without the product.

    Args:
        moment: `(..., rows, rank)`; modified in place.
        places: `(..., rank)`, see `places_of`; may lack leading axes of `moment`.
    """
    columns = places.unsqueeze(-2)
    taken = moment.gather(-1, columns.clamp_min(0).expand(moment.shape))
    moment.copy_(taken.masked_fill_(columns < 0, 0))
