"""The SVD-free projector: the best columns of the discrete cosine basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional import dct_basis, product, usable
from ..plan import Matrix, Site, State
from ._basis import Basis, IndexTransport


@dataclass(frozen=True)
class DCT(IndexTransport, Basis):
    """The `rank` columns of the orthonormal DCT-II basis Q that carry most of the gradient.

    S = G Q; a column's score is its l1 (or l2) norm; the best indices, sorted, are the whole state:
    P = Q[:, index], and at a refresh G P = S[:, index] comes for free. Layers of one width share Q.
    With the l2 norm the subset is the best that the basis has (least reconstruction error).

    Args:
        norm: "l1" or "l2".

    Raises:
        ValueError: an unknown norm.

    Reference: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large
        Language Models" (DCT-AdamW), arXiv 2505.17967.
    """

    norm: str = "l1"
    keys: ClassVar[tuple[str, ...]] = ("index",)
    on_refresh: ClassVar[tuple[str, ...]] = ("keep", "reset", "rotate")

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f'norm must be "l1" or "l2", got {self.norm!r}')

    def cosines(self, site: Site) -> Tensor:
        """Return Q, `(cols, cols)`, one for all layers of this width, dtype and device."""
        n, dtype, device = site.cols, site.dtype, site.device
        return site.shared.get(("dct", n, dtype, device), lambda: dct_basis(n, dtype, device))

    def basis(self, state: State, site: Site) -> Tensor:
        """Return `Q[:, index]`."""
        rows = self.cosines(site).mT
        return rows[state["index"]].mT

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return the `rank` lowest frequencies."""
        index = torch.arange(site.rank, device=site.device)
        return {"index": index.expand(*batch, -1).clone()}

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Choose the columns of largest norm."""
        for matrix in matrices:
            self._refresh(*matrix)

    def _refresh(self, grad: Tensor, state: State, site: Site) -> None:
        good = usable(grad, site.wanted).squeeze(-1)
        dtype = site.dtype if grad.dtype == torch.float16 else grad.dtype
        spectrum = product(grad, self.cosines(site), dtype)
        scores = torch.linalg.vector_norm(spectrum, 1 if self.norm == "l1" else 2, dim=-2)
        best = scores.topk(site.rank, dim=-1).indices.sort(dim=-1).values
        index: Tensor = state["index"]
        index.copy_(torch.where(good, best, index))
