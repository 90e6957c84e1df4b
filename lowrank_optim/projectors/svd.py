"""The exact projector: top right-singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import canonical_signs, peaks, usable
from ..plan import Matrix, Site, State
from ._basis import Basis


@dataclass(frozen=True)
class SVD(Basis):
    """The top `rank` right-singular vectors of the gradient, by LAPACK or its CUDA counterpart.

    O(rows cols^2) work and a decomposition's workspace at every refresh: `Power` finds practically
    the same subspace in a small part of the time. Signs are made canonical, so that kept moments do
    not depend on the library. Where there are fewer rows than the rank, the basis is completed.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507.
    """

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Set the basis from `grad`; keep it if the gradient or the decomposition is not usable."""
        for matrix in matrices:
            self._refresh(*matrix)

    def _refresh(self, grad: Tensor, state: State, site: Site) -> None:
        good = usable(grad, site.wanted)
        work = grad.to(site.dtype, copy=True)
        work.div_(torch.where(good, peaks(work), 1.0)).masked_fill_(~good, 0)
        try:
            if work.shape[-2] > work.shape[-1]:
                work = torch.linalg.qr(work, mode="r").R
            right = torch.linalg.svd(work, full_matrices=work.shape[-2] < site.rank).Vh
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return
        basis = canonical_signs(right[..., : site.rank, :].mT)
        state["basis"].copy_(torch.where(good, basis, state["basis"]))
