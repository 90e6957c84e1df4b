"""The exact projector: top right-singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import canonical_signs, gram, peaks, usable
from ..types import Matrix, Site
from ._basis import Basis, peaks_of


@dataclass(frozen=True)
class SVD(Basis):
    """The top `rank` right-singular vectors of the gradient, by LAPACK or its CUDA counterpart.

    O(rows cols^2) work and a decomposition's workspace at every refresh: `Power` finds practically
    the same subspace in a small part of the time. Signs are made canonical, so that kept moments do
    not depend on the library. Where there are fewer rows than the rank, the basis is completed.

    At least as many rows as columns in float32, and rows shared out over processes, take the
    eigenvectors of G^T G in float64: products of two float32 are exact there, and its rounding
    falls below singular values of 1e-8 times the largest, which a float32 SVD does not find either.
    Otherwise the SVD of G in float64 (of R where G = QR has more rows). Shared rows add up G^T G
    for one process, a different one for each matrix, which decomposes it and shares the basis.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507.
    """

    bases: ClassVar[tuple[str, ...]] = ("basis",)
    decomposes: ClassVar[bool] = True

    @torch.no_grad()
    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Set the bases from gradients; keep one where gradient or decomposition is not usable."""
        good, team = usable(peaks_of(matrices)), matrices[0].site.team
        for first in range(0, len(matrices), team.size):
            places = range(first, min(first + team.size, len(matrices)))
            squares = {place: self._square(matrices[place], place) for place in places}
            for place in places:
                if team.owns(place):
                    self._refresh(matrices[place], good[place], squares[place])

    def _square(self, matrix: Matrix, place: int) -> Tensor | None:
        """Return G^T G over all rows, where this process is to decompose it."""
        grad, _, site = matrix
        if not site.team.parts and (site.dtype == torch.float64 or grad.shape[-2] < site.cols):
            return None
        square = gram(grad)
        site.team.collect_(square, place)
        return square if site.team.owns(place) else None

    def _refresh(self, matrix: Matrix, good: Tensor, square: Tensor | None) -> None:
        grad, state, site = matrix
        good = good if site.wanted is None else good & site.wanted
        try:
            found = vectors(grad, good, site) if square is None else eigenvectors(square, good)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return
        basis = canonical_signs(found[..., : site.rank]).to(state["basis"].dtype)
        state["basis"].copy_(torch.where(good, basis, state["basis"]))


def eigenvectors(square: Tensor, good: Tensor) -> Tensor:
    """Return the eigenvectors of G^T G where `good`, the top ones first.

    In float64, which overflows for no float32. No full-size temporary: what is made is of the size
    of G^T G, `(..., cols, cols)`.
    """
    square = square.masked_fill_(~good, 0)
    square.div_(peaks(square).clamp_min_(torch.finfo(square.dtype).tiny))
    found: Tensor = torch.linalg.eigh(square).eigenvectors
    return found.flip(-1)


def vectors(grad: Tensor, good: Tensor, site: Site) -> Tensor:
    """Return the right-singular vectors where `good`, the top ones first, by QR and SVD."""
    work = grad.to(torch.float64, copy=True)
    work.div_(torch.where(good, peaks(work), 1.0)).masked_fill_(~good, 0)
    if work.shape[-2] > work.shape[-1]:
        work = torch.linalg.qr(work, mode="r").R
    found: Tensor = torch.linalg.svd(work, full_matrices=work.shape[-2] < site.rank).Vh
    return found.mT
