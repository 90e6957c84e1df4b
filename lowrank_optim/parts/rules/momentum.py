"""Rules with one moment: momentum, and its sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..types import Group, Moments
from ._base import Linear


@dataclass(frozen=True)
class Lion(Linear):
    """Sign of an interpolated momentum.

    N = sgn(b1 M + (1-b1) g),  M <- b2 M + (1-b2) g

    Reads `betas` of the group; the paper's are (0.9, 0.99), with an lr 3 to 10 times below Adam's.

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moment in place and return the sign of the interpolation."""
        beta1, beta2 = group["betas"]
        moment = moments["exp_avg"]
        sign = moment.lerp(grad, 1 - beta1).sign_()
        moment.lerp_(grad, 1 - beta2)
        return sign


@dataclass(frozen=True)
class SGDM(Linear):
    """Gradient descent with momentum, undamped as in `torch.optim.SGD`.

    M <- b1 M + g,  N = M,  with b1 the first of the group's `betas`.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moment in place and return a copy of it."""
        return moments["exp_avg"].mul_(group["betas"][0]).add_(grad).clone()
