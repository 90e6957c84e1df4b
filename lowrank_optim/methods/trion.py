"""Trion."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.feeds import ErrorFeedback
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import Drop
from ..parts.rules import Orthogonal
from ._common import split_length, with_parts
from .bibliography import Paper
from .dct import PAPER as DCT
from .muon import PAPER as MUON
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class TrionW(LowRank):
    """Orthogonalised momentum in the cosine columns that carry most of it.

    B = M + G,  P = Q[:, index] of the largest columns of B Q,  M <- B - (1 - mu) B P P^T,
    W <- (1 - lr wd) W - lr scale s NS(B P) P^T.
    Memory: m n values, a byte each with `momentum_dtype="8bit"`, r integers, and one n x n basis
    for all layers of a width.

    Args:
        lr: of matrices; give other parameters a learning rate in a group of their own.
            2e-2 is the default with the published length, 1e-3 with another.
        betas, eps: of AdamW, for parameters that are not matrices and for `length="adamw"`. torch's
            `OneCycleLR` and `CyclicLR` cycle these, and never `momentum`.
        momentum: mu.
        momentum_dtype: how M is stored, see `ErrorFeedback`.
        length: one of the forms of Jordan, Kimi, Dion and none, see `Orthogonal`; or "rms" or
            "adamw", see `LowRank`, which AdamW's lr fits.
        For the other arguments and errors see `LowRank`.

    Reference: Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
        Optimization of Large Language Models", arXiv 2505.17967, from its algorithm; the published
        file does not run. The momentum is Dion's, arXiv 2504.05295; at full rank this is Muon,
        https://kellerjordan.github.io/posts/muon/, in the cosine basis and without `nesterov`.
    """

    published_lr: ClassVar[float] = 2e-2

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = 0.25,
        update_proj_gap: int = 1,
        scale: float | None = None,
        projector: str | Projector = "dct",
        on_refresh: str = "keep",
        momentum: float = 0.95,
        momentum_dtype: str | None = None,
        length: str = "original",
        **common: Unpack[Common],
    ) -> None:
        length, own = split_length(length)
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(
                common, self, rule=Orthogonal(own), residual=Drop(),
                feed=ErrorFeedback(momentum, momentum_dtype),
            ),
        )  # fmt: skip


DION = Paper(
    "ahn2025dion",
    "Dion: Distributed Orthonormalized Updates",
    (
        "Ahn, Kwangjun",
        "Xu, Byron",
        "Abreu, Natalie",
        "Fan, Ying",
        "Magakyan, Gagik",
        "Sharma, Pratyusha",
        "Zhan, Zheng",
        "Langford, John",
    ),
    2025,
    "2504.05295",
)
METHOD = Method(
    "trion",
    "Trion",
    TrionW,
    "mn, r integers, one n x n basis for all layers",
    (DCT, DION, MUON),
    own_gap=True,
    rates=Rates(5.5e-2, 1e-1),
)
