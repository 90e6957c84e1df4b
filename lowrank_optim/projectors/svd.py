"""The exact projector: top right-singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import canonical_signs, gram, peaks, usable
from ..plan import Matrix, Site, State
from ._basis import Basis


@dataclass(frozen=True)
class SVD(Basis):
    """The top `rank` right-singular vectors of the gradient, by LAPACK or its CUDA counterpart.

    O(rows cols^2) work and a decomposition's workspace at every refresh: `Power` finds practically
    the same subspace in a small part of the time. Signs are made canonical, so that kept moments do
    not depend on the library. Where there are fewer rows than the rank, the basis is completed.

    Arithmetic in float32 takes the eigenvectors of G^T G in float64: products of two float32 are
    exact there, and its rounding falls below singular values of 1e-8 times the largest, which a
    float32 SVD does not find either. It is the more accurate of the two by three digits or more.
    float64, and fewer rows than columns, take the SVD of G (of R where G = QR has more rows).

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507.
    """

    @torch.no_grad()
    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Set the basis from `grad`; keep it if the gradient or the decomposition is not usable."""
        for matrix in matrices:
            self._refresh(*matrix)

    def _refresh(self, grad: Tensor, state: State, site: Site) -> None:
        good = usable(grad, site.wanted)
        by_gram = site.dtype != torch.float64 and grad.shape[-2] >= grad.shape[-1]
        try:
            basis = (eigenvectors if by_gram else vectors)(grad, good, site)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return
        basis = canonical_signs(basis).to(state["basis"].dtype)
        state["basis"].copy_(torch.where(good, basis, state["basis"]))


def eigenvectors(grad: Tensor, good: Tensor, site: Site) -> Tensor:
    """Return the top eigenvectors of G^T G where `good`, in float64: it overflows for no float32.

    No full-size temporary: what is made is of the size of G^T G, `(..., cols, cols)`.
    """
    square = gram(grad).masked_fill_(~good, 0)
    square.div_(peaks(square).clamp_min_(torch.finfo(square.dtype).tiny))
    found: Tensor = torch.linalg.eigh(square).eigenvectors
    return found[..., -site.rank :].flip(-1)


def vectors(grad: Tensor, good: Tensor, site: Site) -> Tensor:
    """Return the top right-singular vectors where `good`, by QR and SVD."""
    work = grad.to(site.dtype, copy=True)
    work.div_(torch.where(good, peaks(work), 1.0)).masked_fill_(~good, 0)
    if work.shape[-2] > work.shape[-1]:
        work = torch.linalg.qr(work, mode="r").R
    found: Tensor = torch.linalg.svd(work, full_matrices=work.shape[-2] < site.rank).Vh
    return found[..., : site.rank, :].mT
