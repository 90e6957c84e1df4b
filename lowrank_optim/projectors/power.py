"""The projector to recommend: block power iteration, warm-started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import canonical_signs, generator, peaks, product, product_t, usable
from ..plan import Matrix, Site, State
from ._basis import Basis


@dataclass(frozen=True)
class Power(Basis):
    """Nearly the top right-singular vectors, by products and one thin QR an iteration.

    Y <- G^T (G X),  X <- qr(Y), started from the previous basis and a few random columns (all
    random at the first refresh: a randomized range finder); then the best `rank` directions inside
    X by the small problem (G X)^T (G X) (Rayleigh-Ritz).
    4 rows cols (rank + oversample) flops an iteration; no decomposition of a full matrix.

    Args:
        iterations: power iterations a refresh, at least 1. With 2, a basis that knows nothing of
            the gradient captures 0.99 of what SVD does on slowly decaying spectra; with 1, 0.93.
        oversample: random columns beside the rank; they find what the old basis has lost.

    Raises:
        ValueError: iterations below 1 or a negative oversample.

    Reference: Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061,
        algorithm 4.4.
    """

    iterations: int = 2
    oversample: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations must be an int of at least 1, got {self.iterations!r}")
        if not isinstance(self.oversample, int) or self.oversample < 0:
            raise ValueError(f"oversample must be an int of at least 0, got {self.oversample!r}")

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Move the basis towards the top right-singular vectors of `grad`."""
        for matrix in matrices:
            self._refresh(*matrix)

    def _refresh(self, grad: Tensor, state: State, site: Site) -> None:
        good = usable(grad, site.wanted)
        width = min(site.rank + self.oversample, site.cols)
        old: Tensor = state["basis"].to(site.dtype)
        known = 0 if site.step == 0 else site.rank
        rng = generator(torch.device("cpu"), site.seed, site.step)
        fresh = torch.randn(site.cols, width - known, dtype=site.dtype, device="cpu", generator=rng)
        fresh = fresh.to(site.device).expand(*old.shape[:-2], -1, -1)
        probe = torch.cat([old[..., :known], fresh], dim=-1)
        limits = torch.finfo(site.dtype)
        scale = peaks(grad).to(site.dtype).clamp(limits.tiny**0.8, limits.max**0.8)
        try:
            for _ in range(self.iterations):
                image = normed(product(grad, probe / scale, site.dtype))
                back = product_t(grad, image / scale, site.dtype)
                good = good & peaks(back).isfinite()
                probe = torch.linalg.qr(back.masked_fill_(~good, 0)).Q
            image = normed(product(grad, probe / scale, site.dtype))
            good = good & peaks(image).isfinite()
            image.masked_fill_(~good, 0)
            order = torch.linalg.eigh(image.mT @ image).eigenvectors.flip(-1)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return
        basis = canonical_signs(probe @ order[..., : site.rank])
        state["basis"].copy_(torch.where(good, basis, state["basis"]))


def normed(image: Tensor) -> Tensor:
    """Scale each matrix to a largest entry of 1, in place: no product over- or underflows."""
    peak = peaks(image)
    return image.div_(torch.where(peak > 0, peak, 1.0))
