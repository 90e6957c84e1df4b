"""What rules have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..kinds import Kind
from ..numbers import Number
from ..protocols import Rule
from ..types import Group, Job, Moments, Site, State


class Elementwise:
    """A rule that works element by element and keeps nothing except moments."""

    keys: ClassVar[tuple[str, ...]] = ()
    row_keys: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[Mapping[str, Kind]] = {}
    numbers: ClassVar[Mapping[str, Number]] = {}
    whole: ClassVar[bool] = False
    unprojected: ClassVar[bool] = False

    @property
    def plain(self) -> Rule:
        """The rule itself: parameters that are not projected are stepped by it too."""
        return self  # type: ignore[return-value]

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return no state besides the moments."""
        return {}

    def complete(
        self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group
    ) -> list[Tensor]:
        """Return the directions as they are."""
        return list(directions)


class Linear(Elementwise):
    """A rule whose moments are linear in the gradients, and not corrected for a bias."""

    squares: ClassVar[tuple[str, ...]] = ()

    def rotate(self, moments: Moments, rotation: Tensor, count: int, group: Group) -> None:
        """Carry all moments in place, exactly: M <- M Q."""
        for moment in moments.values():
            moment.copy_(moment @ rotation)

    def uncorrected(self, count: int | Tensor, group: Group) -> float | Tensor:
        """Return 1: there is no bias correction."""
        return 1.0

    def counts_on_device(self, param: Tensor, moments: State, group: Group) -> bool:
        """Return False: the step count stays on the host."""
        return False

    def step_plain(self, jobs: list[Job], group: Group) -> list[Job]:
        """Leave all undone: torch has no functional form of these with decoupled decay."""
        return jobs
