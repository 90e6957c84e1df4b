"""What projectors with a dense basis have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import Factor, peaks, places_of, select_moment
from ..kinds import UNIT, Kind
from ..protocols import Rule
from ..types import Group, Matrix, Moments, Site, State


def peaks_of(matrices: Sequence[Matrix]) -> Tensor:
    """Return the largest absolute value of each matrix, `(len(matrices), ..., 1, 1)`.

    It is in the dtype of the arithmetic, and not finite where a value is not finite.
    """
    site = matrices[0].site
    return site.team.max_(torch.stack([peaks(grad).to(site.dtype) for grad, _, _ in matrices]))


class Basis:
    """A projector onto the columns of an orthonormal basis `(..., cols, rank)`.

    A half-precision gradient is never widened whole, see `functional.product`.
    """

    keys: ClassVar[tuple[str, ...]] = ("basis",)
    kinds: ClassVar[Mapping[str, Kind]] = {"basis": UNIT}
    common: ClassVar[tuple[str, ...]] = ()
    bases: ClassVar[tuple[str, ...]] = ()
    on_refresh: ClassVar[tuple[str, ...]] = ("keep", "reset", "rotate", "align")
    learns: ClassVar[bool] = True
    decomposes: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    everything: ClassVar[bool] = False
    captures: ClassVar[str] = "step"

    def basis(self, state: State, site: Site) -> Tensor:
        """Return P, `(..., cols, rank)`."""
        basis: Tensor = state["basis"]
        return basis

    def width(self, site: Site) -> int:
        """Return the rank."""
        return site.rank

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return the first `rank` unit vectors."""
        eye = torch.eye(site.cols, site.rank, dtype=dtype, device=site.device)
        return {"basis": eye.expand(*batch, -1, -1).clone()}

    def factor(self, state: State, site: Site) -> Factor:
        """Return P."""
        return self.basis(state, site)

    def places(self, before: Sequence[State], states: Sequence[State]) -> Tensor | None:
        """Return None: moments turn by a product."""
        return None

    def transport(
        self, rule: Rule, moments: Moments, before: State, state: State, site: Site, group: Group
    ) -> None:
        """Rotate the moments by `P_old^T P_new`, in place."""
        old, new = self.basis(before, site), self.basis(state, site)
        rule.rotate(moments, old.mT.to(site.dtype) @ new.to(site.dtype), site.step, group)

    def align(self, before: State, state: State) -> None:
        """Turn the basis in place: P <- P U V^T with U S V^T = svd(P^T P_old).

        That is the basis of the same span that is nearest to the old one (orthogonal Procrustes).
        """
        basis: Tensor = state["basis"]
        work = basis.to(torch.float32) if basis.dtype == torch.bfloat16 else basis
        try:
            left, _, right = torch.linalg.svd(work.mT @ before["basis"].to(work.dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return
        basis.copy_(work @ (left @ right))


class IndexTransport:
    """Carrying moments between two subsets of the columns of one fixed basis: copies, no product.

    `align` has no meaning there and is not offered.
    """

    def places(self, before: Sequence[State], states: Sequence[State]) -> Tensor:
        """Return where the columns were, `(len(states), ..., rank)`, see `functional.places_of`."""
        old, new = (torch.stack([state["index"] for state in some]) for some in (before, states))
        return places_of(old, new)

    def transport(
        self, rule: Rule, moments: Moments, before: State, state: State, site: Site, group: Group
    ) -> None:
        """Keep the moments of indices that stay and zero the moments of new ones, in place."""
        places = self.places([before], [state])[0]
        for moment in moments.values():
            select_moment(moment, places)

    def align(self, before: State, state: State) -> None:
        """Raise: a subset cannot be turned; `Plan` refuses the setting."""
        raise ValueError("a subset of a fixed basis cannot be aligned")
