"""The gradient as it is: the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..protocols import Carried, Fed
from ..types import Group, Moments


@dataclass(frozen=True)
class Gradient:
    """The gradient as it is; nothing is carried."""

    slots: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    on_refresh: ClassVar[tuple[str, ...] | None] = None
    full: ClassVar[bool] = False
    captures: ClassVar[bool] = True
    dtype: ClassVar[str | None] = None

    def feed(self, grad: Tensor, held: Moments, carried: Carried, group: Group) -> Fed:
        """Return the gradient."""
        return Fed(grad, grad, {})

    def taken(self, low: Tensor, moments: Moments, group: Group) -> None:
        """Return None."""
