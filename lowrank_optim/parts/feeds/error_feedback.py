"""Error feedback: what the projection drops is added to the next gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...functional import reach
from ..numbers import Number, check_numbers
from ..protocols import Carried, Fed
from ..types import Group, Moments


@dataclass(frozen=True)
class ErrorFeedback:
    """Feed the gradient and what was carried; carry what was not used, and a share of what was.

    A = G + E,  E <- A - (1 - keep) A P P^T

    With `keep` 0, E is the error of the projection. With `keep` above 0 it is a momentum too:
    Dion's and Trion's, with P = I heavy-ball momentum.

    Args:
        keep: share of the used part that stays, in [0, 1); a group whose rule has no momentum of
            its own may call it `momentum`.
        dtype: how E is stored: "bfloat16", "8bit", "4bit", another `state_dtype`, or None: as
            the moments are. E is as large as the weight.

    Raises:
        ValueError: keep outside of [0, 1).

    Reference: Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford, "Dion: Distributed
        Orthonormalized Updates", arXiv 2504.05295, for `keep` above 0; Modoranu et al., arXiv
        2505.17967, for 0 with the columns of the cosine basis.
    """

    keep: float = 0.0
    dtype: str | None = "bfloat16"
    slots: ClassVar[tuple[str, ...]] = ("error",)
    needs: ClassVar[tuple[str, ...]] = ()
    on_refresh: ClassVar[tuple[str, ...] | None] = None
    full: ClassVar[bool] = False
    captures: ClassVar[bool] = True
    numbers: ClassVar[Mapping[str, Number]] = {"keep": Number.decay("keep", also=("momentum",))}

    def __post_init__(self) -> None:
        check_numbers(self)

    def feed(self, grad: Tensor, held: Moments, carried: Carried, group: Group) -> Fed:
        """Return G + E, with E cut off where the sum might overflow."""
        error = held["error"]
        most = reach(error.dtype)
        fed = error.clamp_(-most, most).add_(grad)
        return Fed(fed, fed, {"error": fed})

    def taken(self, low: Tensor, moments: Moments, group: Group) -> Tensor:
        """Return (1 - keep) A P."""
        keep: float = group["keep"]
        return low * (1 - keep)
