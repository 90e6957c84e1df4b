"""Generalised error feedback, for the moments too: LDAdam's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..numbers import Number
from ..protocols import Carried, Fed
from ..types import Group, Moments
from .error_feedback import ErrorFeedback


@dataclass(frozen=True)
class GeneralErrorFeedback(ErrorFeedback):
    """Carry what the gradient loses and, where the subspace moves, what the momentum loses.

    A = G + E;  the subspace P' is learnt from B = rho m P^T + (1 - rho) A, m without bias;
    E <- A - A P' P'^T + b1 / (1 - b1) (M P^T - M' P'^T)

    with M the first moment before and M' after it is carried into P', which `on_refresh="rotate"`
    does by M P^T P'. b1 is the first of the group's `betas`. The first B is A.

    Args:
        rho: share of the momentum in what the subspace is learnt from, in [0, 1].
        keep, dtype: see `ErrorFeedback`; the paper has `keep` 0.

    Raises:
        ValueError: rho outside of [0, 1], or as `ErrorFeedback`.

    Reference: Robert, Safaryan, Modoranu, Alistarh, "LDAdam: Adaptive Optimization from
        Low-Dimensional Gradient Statistics", arXiv 2410.16103. The authors' code keeps E in the
        gradient between steps; here it is state, so that gradients may be clipped, accumulated and
        freed.
    """

    rho: float = 0.908
    needs: ClassVar[tuple[str, ...]] = ("exp_avg",)
    captures: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, Number]] = {
        "keep": Number.decay("keep"),
        "rho": Number.share("rho"),
    }

    def feed(self, grad: Tensor, held: Moments, carried: Carried, group: Group) -> Fed:
        """Return A, B and A + b1 / (1 - b1) M P^T."""
        fed = super().feed(grad, held, carried, group).grad
        if carried.seen == 0:
            return Fed(fed, fed, {"error": fed})
        beta1, rho = group["betas"][0], group["rho"]
        momentum = carried.lift(carried.moment("exp_avg"))
        lesson = momentum * (rho / (1 - beta1**carried.seen))
        lesson.add_(fed, alpha=1 - rho)
        return Fed(fed, lesson, {"error": momentum.mul_(ratio(group)).add_(fed)})

    def taken(self, low: Tensor, moments: Moments, group: Group) -> Tensor:
        """Return A P' + b1 / (1 - b1) M'."""
        return super().taken(low, moments, group).add_(moments["exp_avg"], alpha=ratio(group))


def ratio(group: Group) -> float:
    """Return b1 / (1 - b1)."""
    beta1: float = group["betas"][0]
    return beta1 / (1 - beta1)
