"""Rules with one moment: momentum, and the sign of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..plan import Group, Job
from ..protocols import Moments
from ._elementwise import Elementwise


@dataclass(frozen=True)
class _OneMoment(Elementwise):
    """What rules with one, linear moment have in common."""

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    squares: ClassVar[tuple[str, ...]] = ()

    def rotate(self, moments: Moments, rotation: Tensor, count: int, group: Group) -> None:
        """Carry the moment in place: M <- M Q, exactly."""
        moments["exp_avg"].copy_(moments["exp_avg"] @ rotation)

    def uncorrected(self, count: int | Tensor, group: Group) -> float | Tensor:
        """Return 1: there is no bias correction."""
        return 1.0

    def counts_on_device(self, param: Tensor, moments: torch.dtype, group: Group) -> bool:
        """Return False: the step count stays on the host."""
        return False

    def step_plain(self, jobs: list[Job], group: Group) -> list[Job]:
        """Leave all undone: torch has no functional form of these with decoupled decay."""
        return jobs


@dataclass(frozen=True)
class Lion(_OneMoment):
    """Sign of an interpolated momentum.

    N = sgn(b1 M + (1-b1) g),  M <- b2 M + (1-b2) g

    Reads `betas` of the group; the paper's are (0.9, 0.99), with an lr 3 to 10 times below Adam's.

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
    """

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
class SGDM(_OneMoment):
    """Gradient descent with momentum, undamped as in `torch.optim.SGD`.

    M <- b1 M + g,  N = M,  with b1 the first of the group's `betas`.
    """

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moment in place and return a copy of it."""
        return moments["exp_avg"].mul_(group["betas"][0]).add_(grad).clone()
