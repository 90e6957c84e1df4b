"""What rules for whole matrices have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..protocols import Rule
from ..types import Group, Moments, Site
from ._base import Linear
from .adam import Adam


class OfMatrices(Linear):
    """A rule for whole matrices, without moments; parameters that are not projected get Adam."""

    slots: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = True

    @property
    def plain(self) -> Rule:
        """Adam."""
        return Adam()

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Return the gradient: all is done by `complete`."""
        return grad


def zeros(shape: tuple[int, ...], site: Site) -> Tensor:
    """Return zeros in the dtype of the arithmetic."""
    return torch.zeros(shape, dtype=site.dtype, device=site.device)
