"""What residuals have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ...functional import Norms
from ..kinds import NORM, Kind
from ..limiter import limiter_state
from ..numbers import Number, check_numbers
from ..types import Group, Site, State


class Stateless:
    """A residual that keeps nothing, and updates every row for itself."""

    kinds: ClassVar[Mapping[str, Kind]] = {}
    numbers: ClassVar[Mapping[str, Number]] = {}

    @property
    def keys(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def row_keys(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return no state."""
        return {}

    def sums(self, norms: Norms | None, state: State, site: Site, group: Group) -> Tensor | None:
        """Return None."""
        return None

    def limited(
        self, sums: Tensor, state: State, site: Site, group: Group, uncorrected: float | Tensor
    ) -> Tensor | float:
        """Return 1."""
        return 1.0


class Limited(Stateless):
    """A residual with a limiter: what it keeps is one norm a matrix, or nothing without one."""

    limiter: float | None
    kinds: ClassVar[Mapping[str, Kind]] = {"residual_norm": NORM}
    numbers: ClassVar[Mapping[str, Number]] = {"limiter": Number.growth("limiter")}

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def keys(self) -> tuple[str, ...]:
        """Name of the limiter's norm, if there is a limiter."""
        return () if self.limiter is None else ("residual_norm",)

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return `residual_norm`, one number a matrix."""
        return limiter_state(batch, site, self.limiter)
