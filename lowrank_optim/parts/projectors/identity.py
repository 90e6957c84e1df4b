"""All columns, always: rules for whole matrices are methods of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import UNIT, Factor
from ..kinds import Kind
from ..types import Matrix, Site, State
from ._basis import Basis


@dataclass(frozen=True)
class Identity(Basis):
    """P = I: the matrix is its own projection, and the rank is ignored."""

    keys: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[Mapping[str, Kind]] = {}
    on_refresh: ClassVar[tuple[str, ...]] = ("keep",)
    learns: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    everything: ClassVar[bool] = True

    def basis(self, state: State, site: Site) -> Tensor:
        """Return the unit matrix, for inspection; nothing is multiplied by it."""
        return torch.eye(site.cols, dtype=site.dtype, device=site.device)

    def width(self, site: Site) -> int:
        """Return the number of columns."""
        return site.cols

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return no state."""
        return {}

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Do nothing: there is no other choice."""

    def factor(self, state: State, site: Site) -> Factor:
        """Return `UNIT`."""
        return UNIT
