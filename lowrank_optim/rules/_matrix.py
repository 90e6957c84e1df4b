"""What rules have in common that look at whole matrices."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..plan import Group, Job, Site, State
from ..protocols import Moments, Rule
from .adam import Adam


class OfMatrices:
    """A rule for matrices; parameters that are not projected are Adam's."""

    slots: ClassVar[tuple[str, ...]] = ()
    squares: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[tuple[str, ...]] = ()
    row_keys: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = True
    unprojected: ClassVar[bool] = False

    @property
    def plain(self) -> Rule:
        """Adam."""
        return Adam()

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return no state besides the moments."""
        return {}

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Return the gradient: all is done by `complete`."""
        return grad

    def rotate(self, moments: Moments, rotation: Tensor, count: int, group: Group) -> None:
        """Carry all moments in place as what is linear: M <- M Q."""
        for moment in moments.values():
            moment.copy_(moment @ rotation)

    def uncorrected(self, count: int | Tensor, group: Group) -> float | Tensor:
        """Return 1: there is no bias correction."""
        return 1.0

    def counts_on_device(self, param: Tensor, moments: torch.dtype, group: Group) -> bool:
        """Return False: the step count stays on the host."""
        return False

    def step_plain(self, jobs: list[Job], group: Group) -> list[Job]:
        """Leave all undone: see `plain`."""
        return jobs


def zeros(shape: tuple[int, ...], site: Site) -> Tensor:
    """Return zeros in the dtype of the arithmetic."""
    return torch.zeros(shape, dtype=site.dtype, device=site.device)
