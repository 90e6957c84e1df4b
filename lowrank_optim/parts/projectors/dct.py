"""The SVD-free projector: the best columns of the discrete cosine basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import functional
from ...functional import dct_basis
from ..kinds import COLUMNS, Kind
from ..types import Matrix, Site, State
from ._basis import Basis, IndexTransport


@dataclass(frozen=True)
class DCT(IndexTransport, Basis):
    """The `rank` columns of the orthonormal DCT-II basis Q that carry most of the gradient.

    S = G Q; a column's score is its l1 (or l2) norm; the best indices, sorted, are the whole state:
    P = Q[:, index]. S is a fast transform, O(log n) a value, and never held; layers of one width
    share Q. With the l2 norm the subset is the best of the basis (least reconstruction error).

    Args:
        norm: "l1" or "l2".

    Raises:
        ValueError: an unknown norm.

    Reference: Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
        Optimization of Large Language Models" (DCT-AdamW), arXiv 2505.17967.
    """

    norm: str = "l1"
    keys: ClassVar[tuple[str, ...]] = ("index",)
    kinds: ClassVar[Mapping[str, Kind]] = {"index": COLUMNS}
    captures: ClassVar[str] = "refresh"
    on_refresh: ClassVar[tuple[str, ...]] = ("keep", "reset", "rotate")

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f'norm must be "l1" or "l2", got {self.norm!r}')

    def cosines(self, site: Site) -> Tensor:
        """Return Q^T, `(cols, cols)`, one for all layers of this width, dtype and device."""
        n, dtype, device = site.cols, site.dtype, site.device
        return site.shared.get(
            ("dct", n, dtype, device), lambda: dct_basis(n, dtype, device).mT.contiguous()
        )

    def basis(self, state: State, site: Site) -> Tensor:
        """Return `Q[:, index]`."""
        cosines, index = self.cosines(site), state["index"]
        if index.ndim > 1:
            return cosines[index].mT
        return cosines.index_select(0, index).mT  # a tenth of the time of indexing

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return the `rank` lowest frequencies."""
        index = torch.arange(site.rank, device=site.device)
        return {"index": index.expand(*batch, -1).clone()}

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Choose the columns of largest norm, by a fast transform of each row: no product."""
        stacks = [m.grad if m.grad.ndim == 3 else m.grad.unsqueeze(0) for m in matrices]
        grads = [grad for stack in stacks for grad in stack.unbind()]
        if not grads:
            return
        scores = self._scores(grads, matrices[0].site)
        best = scores.topk(matrices[0].site.rank, dim=-1).indices.sort(dim=-1).values
        good = scores.isfinite().all(-1, keepdim=True) & (scores.amax(-1, keepdim=True) > 0)
        wanted = [m.site.wanted.reshape(-1, 1) for m in matrices if m.site.wanted is not None]
        if wanted:
            good &= torch.cat(wanted)
        indices: list[Tensor] = [state["index"] for _, state, _ in matrices]
        before = torch.stack(indices)
        after = torch.where(good, best, before.view(best.shape)).view(before.shape)
        torch._foreach_copy_(indices, list(after.unbind()))

    def _scores(self, grads: Sequence[Tensor], site: Site) -> Tensor:
        """Return the scores of the columns, `(len(grads), cols)`, over all rows."""
        ops, first = site.ops, grads[0]
        if ops is not functional and not (first.numel() and ops.supports(site.cols, first.dtype)):
            ops = functional
        with functional.on_device(first.device):
            scores: Tensor = ops.dct_scores(grads, self.norm)
        if self.norm == "l2" and site.team.parts:
            return site.team.sum_(scores.square_()).sqrt_()
        return site.team.sum_(scores)
