"""RMNP's rule: momentum whose rows are made equally long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numbers import Number, check_numbers
from ..types import Group, Job, Moments
from ._matrix import OfMatrices


@dataclass(frozen=True)
class RowNormalized(OfMatrices):
    """Momentum, each neuron divided by its norm.

    M <- mu M + (1-mu) R,  N_i = M_i / |M_i|, and 0 where M_i = 0

    A neuron i is a row of the weight, (out, in), wherever the projected axis lies. The values of
    N_i have a root mean square of 1 / sqrt(in).

    Args:
        momentum: mu, in [0, 1).

    Raises:
        ValueError: a momentum outside of [0, 1).

    Reference: Deng et al., "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based
        Optimization", arXiv 2603.20527, the paper's formula. The authors' code also looks ahead by
        one gradient and lengthens steps of tall matrices by sqrt(out / in).
    """

    momentum: float = 0.95
    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    unprojected: ClassVar[bool] = True
    numbers: ClassVar[Mapping[str, Number]] = {"momentum": Number.decay("momentum")}

    def __post_init__(self) -> None:
        check_numbers(self)

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moment in place and return it."""
        momentum: float = group["momentum"]
        return moments["exp_avg"].mul_(momentum).add_(grad, alpha=1 - momentum)

    def complete(
        self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group
    ) -> list[Tensor]:
        """Return N of each matrix, by norms of a neuron's largest value: squares keep in range."""
        layout = jobs[0].layout
        moments = torch.stack(list(directions))
        axis = -2 if layout.wide else -1
        largest = moments.abs().amax(axis, keepdim=True)
        if layout.wide:
            largest = layout.team.max_(largest)
        units = torch.where(largest > 0, moments / largest, 0)
        squares = units.square().sum(axis, keepdim=True)
        if layout.wide:
            squares = layout.team.sum_(squares)
        return list((units / squares.clamp_(min=1).sqrt_()).unbind())
