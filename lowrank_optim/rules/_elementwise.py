"""What rules have in common that step every value, or every row, for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..plan import Group, Job, Site, State
from ..protocols import Rule


class Elementwise:
    """A rule that needs no more of a matrix than this process holds."""

    keys: ClassVar[tuple[str, ...]] = ()
    row_keys: ClassVar[tuple[str, ...]] = ()
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
