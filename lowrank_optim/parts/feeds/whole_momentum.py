"""A first moment of full size, from which the subspace is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...functional import raise_square_
from ..protocols import Carried, Fed
from ..types import Group, Moments


@dataclass(frozen=True)
class WholeMomentum:
    """Keep Adam's first moment whole, learn the subspace from it, and show the rule its projection.

    M <- b1 M + (1-b1) G;  P is learnt from M;  the rule sees G P, and M P in place of a first
    moment of its own, which a change of P therefore never makes stale. Adam's second moment stays
    in the basis that it was made in, and is raised to the least value that M allows, see
    `raise_square_`.

    Args:
        dtype: how M is stored, see `ErrorFeedback`; None: as the other moments are.

    Reference: Wang et al., "Conda: Column-Normalized Adam for Training Large Language Models
        Faster", arXiv 2509.24218, at full rank. SOAP, arXiv 2409.11321, also keeps its first moment
        whole.
    """

    dtype: str | None = None
    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    needs: ClassVar[tuple[str, ...]] = ("exp_avg",)
    on_refresh: ClassVar[tuple[str, ...] | None] = ("keep",)
    full: ClassVar[bool] = True
    captures: ClassVar[bool] = True

    def feed(self, grad: Tensor, held: Moments, carried: Carried, group: Group) -> Fed:
        """Return G, and the new M to learn from and to keep."""
        decay = group["betas"][0]
        momentum = held["exp_avg"].mul(decay).add_(grad, alpha=1 - decay)
        return Fed(grad, momentum, {"exp_avg": momentum})

    def taken(self, low: Tensor, moments: Moments, group: Group) -> None:
        """Return None: nothing leaves M. A second moment of an older basis is raised, in place."""
        if (square := moments.get("exp_avg_sq")) is not None:
            raise_square_(moments["exp_avg"], square, *group["betas"])
